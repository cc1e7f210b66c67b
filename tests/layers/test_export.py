"""torch.export and torch.compile of layers and models: one graph for all sizes, and what it computes is exact."""

import io

import pytest
import torch
from helpers.common import KINDS, make_bases, make_layer, normal
from helpers.models import adapt, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn

import randlora

SIZES = (1, 2, 7, 1000)
DYNAMIC = {0: torch.export.Dim.DYNAMIC}
strictness = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


def assert_exports(model, make_input, strict=False, dynamic=True):
    """The program gives the model's own bits for every size."""
    example = make_input(3)
    program = torch.export.export(model, (example,), dynamic_shapes=(DYNAMIC,) if dynamic else None, strict=strict)
    compute = program.module()
    for size in SIZES if dynamic else (3,):
        x = make_input(size)
        assert torch.equal(compute(x), model(x))
    return program


@strictness
@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
@pytest.mark.parametrize("strategy", ["auto", "factored", "merged"])
def test_a_layer_that_was_never_called(strategy, dynamic, strict):
    """Its bases are made while it is exported, and stay real tensors that the layer can go on with."""
    layer = make_layer(41, 24, strategy=strategy)
    program = assert_exports(layer, lambda size: normal(size, 41), strict, dynamic)
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["randlora.linear.default"]
    assert all(type(t) is torch.Tensor for t in program.constants.values())
    assert type(layer(normal(3, 41))) is torch.Tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(130, 341, 8), (341, 130, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_bases(kind, shape, dtype):
    layer = make_layer(*shape, dtype=dtype, bases=make_bases(*shape, kind=kind))
    assert_exports(layer, lambda size: normal(size, 2, shape[0], dtype=dtype))


@strictness
def test_several_adapters_and_dropout(strict):
    layer = make_layer(41, 24, randlora_dropout=0.5)
    layer.update_layer("second", r=3)
    layer.set_adapter(["default", "second"])
    assert_exports(layer.eval(), lambda size: normal(size, 41), strict)
    program = torch.export.export(layer.train(), (normal(3, 41),), dynamic_shapes=(DYNAMIC,), strict=strict)
    assert not torch.equal(*(program.module()(normal(9, 41)) for _ in range(2)))


@strictness
@pytest.mark.parametrize("without_gradients", [True, False])
def test_programs_have_the_gradients_of_the_model(without_gradients, strict):
    """Also those that were exported under no_grad; and under no_grad none of them records anything."""
    model = nn.Sequential(make_layer(41, 24), nn.ReLU(inplace=True), make_layer(24, 7, bases=make_bases(24, 7, 5)))
    with torch.set_grad_enabled(not without_gradients):
        program = torch.export.export(model, (normal(3, 41),), dynamic_shapes=(DYNAMIC,), strict=strict)
    x, compute = normal(9, 41), program.module()
    with torch.no_grad():
        assert not compute(x).requires_grad
    compute(x).pow(2).sum().backward()
    model(x).pow(2).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    got = {name: p.grad for name, p in compute.named_parameters() if name in expected}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_program_can_be_saved():
    layer = make_layer(41, 24, bases=make_bases(41, 24, 5, kind="sparse"))
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (normal(3, 41),), dynamic_shapes=(DYNAMIC,)), file)
    file.seek(0)
    x = normal(50, 41)
    assert torch.equal(torch.export.load(file).module()(x), layer(x))


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama, tiny_gpt2])
def test_whole_models(make):
    model = adapt(make(), target_modules="all-linear").eval()
    model.config.use_cache = False
    ids = torch.arange(8).view(2, 4)
    with torch.no_grad():
        program = torch.export.export(model, (), {"input_ids": ids}, dynamic_shapes={"input_ids": DYNAMIC})
        for size in (2, 10):
            ids = torch.arange(4 * size).view(size, 4) % 8
            got, expected = program.module()(input_ids=ids).logits, model(input_ids=ids).logits
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("training", [True, False])
def test_compiled_once_for_all_sizes(kind, training):
    torch._dynamo.reset()
    model = nn.Sequential(
        make_layer(130, 341, 8, bases=make_bases(130, 341, 8, kind=kind)),
        nn.ReLU(inplace=True),
        make_layer(341, 130, 8, bases=make_bases(130, 341, 8, kind=kind)),
    )
    compiled = torch.compile(model, dynamic=True, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.set_grad_enabled(training):
        for size in (6, 3, 40, 400, 4000):  # an accidental match with a size of the bases would be a guard
            x = normal(size, 130)
            y = compiled(x)
            assert torch.equal(y, model(x))
            if training:
                y.sum().backward()


def test_fake_tensors_leave_no_traces():
    """A model under FakeTensorMode, to learn shapes, neither makes bases nor leaves fake ones behind."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for kind in KINDS:
        bases = make_bases(130, 341, 8, kind=kind)
        with FakeTensorMode():
            layer = randlora.Linear(nn.Linear(130, 341), r=8, bases=bases)
            y = layer(torch.ones(3, 130))
            y.sum().backward()
        assert y.shape == (3, 341) and bases.nbytes == 0
        layer = make_layer(130, 341, 8, bases=bases)
        assert type(layer(normal(3, 130))) is torch.Tensor
