"""PEFT's sparse and very_sparse bases take the ternary path: the same numbers, and no second dense copy of them."""

import copy
import gc
import io
import weakref

import pytest
import torch
from helpers.cache_cases import call_until_kept
from helpers.common import normal, over, reference_dW
from helpers.counted import SavedBytes
from torch.utils._python_dispatch import TorchDispatchMode

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.peft_models import adapt, bases, config, conv1d, layers, randomize  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402
from randlora.bases import patterns  # noqa: E402

KINDS = {"sparse": 3, "very_sparse": 5}  # and the length of their patterns: planes, lists
SHAPES = {"a": (144, 170), "b": (170, 150), "c": (150, 144)}  # very sparse bases are lists from 100 on

kinds = pytest.mark.parametrize("kind", KINDS)
CPU = torch.device("cpu")


def model_of(kind, dtype=torch.float32, accelerated=True, **arguments):
    model = adapt(layers(dtype, **SHAPES), config("a", "b", "c", r=8, **{kind: True}), accelerated, **arguments)
    with torch.no_grad():
        for name, gamma in model.named_parameters():  # so that three layers keep their sizes
            if "randlora_gamma" in name:
                gamma.div_(10)
    return model


def inner(model):
    return model.base_model.model


class Ops(TorchDispatchMode):
    """randlora's ops that were called, as {(name, length of the pattern that it got)}."""

    def __enter__(self):
        self.called = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "randlora" and func._opname != "check_pattern":
            self.called.add((func._opname, max((len(a) for a in args if isinstance(a, list)), default=0)))
        return func(*args, **(kwargs or {}))


def held(model):
    """Dense copies of the bases and patterns that exist, counted."""
    pairs = {id(layer._pair("default")): layer._pair("default") for layer in (getattr(inner(model), n) for n in SHAPES)}
    assert len(pairs) == 1
    (pair,) = pairs.values()
    dense = len(pair.bases.copies.dense) + (len(pair.signs.copies.dense) - 1 if pair.signs else 0)
    return dense, len(pair.bases.copies.packed)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@kinds
def test_every_path_takes_the_pattern(kind, mode):
    """And no dense copy is made beside those that PEFT saves."""
    model, length = model_of(kind, torch.bfloat16 if mode == "bf16" else torch.float32), KINDS[kind]
    layer, x = inner(model).a, normal(7, 144, dtype=torch.bfloat16 if mode == "bf16" else torch.float32)
    model.add_adapter("other", config("a", r=4, very_sparse=True, projection_prng_key=3))
    assert held(model) == (1, 0), "nothing is made before it is used"

    def ops(call):
        with Ops() as ops, torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            call()
        return ops.called

    assert ops(lambda: model(x).float().sum().backward()) == {("linear", length), ("linear_backward", length)}
    assert ops(lambda: layer.get_delta_weight("default")) == {("sparse_update", length)}
    assert ops(lambda: (model.merge_adapter(), model.unmerge_adapter())) == {("sparse_update", length)}
    names = ["default", "other", "__base__", "default", "other", "other", "default"]
    with model._enable_peft_forward_hooks(x, adapter_names=names):
        assert ops(lambda: layer(x)) == {("linear", length), ("linear", 5)}
    model.eval()
    with torch.no_grad():
        assert ops(lambda: layer(x)) == {("linear", length)}
        expected = layer(x)
        # What the cache builds is get_delta_weight's.
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), randlora.inference_cache() as scope:
            call_until_kept(scope, layer, x)
            assert ((layer(x) - expected).abs().max() / expected.abs().max()).item() < 0.05
    assert held(model) == (1, 1)


@over("dtype", (torch.float32, torch.bfloat16))
@kinds
def test_exactly_the_values_of_the_dense_expansion(kind, dtype):
    """Those that PEFT drew and rounded, multiplied in float64."""
    model = model_of(kind, dtype)
    stored = bases(model)
    assert stored[0].dtype == dtype and len(stored[0].unique()) == 3
    for transposed in (model, adapt(conv1d(144, 170, dtype), config("layer", r=8, **{kind: True}))):
        A, B = bases(transposed)
        transposed.double()
        for layer in (m for m in transposed.modules() if hasattr(m, "randlora_lambda")):
            lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
            exact = reference_dW(A, B, lam, gamma, layer.scaling["default"], layer.in_features, layer.out_features)
            got = layer.get_delta_weight("default")
            assert len(layer.pattern("default")) == KINDS[kind]
            torch.testing.assert_close(got.T if layer.fan_in_fan_out else got, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", ["enabled", "accelerate"])
@over("dtype", (torch.float32, torch.bfloat16))
@kinds
def test_made_once_and_when_it_is_needed(kind, dtype, how, monkeypatch):
    made, of_tensors = [], patterns.of_tensors
    monkeypatch.setattr(patterns, "of_tensors", lambda *tensors, **how: made.append(1) or of_tensors(*tensors, **how))
    model = model_of(kind, dtype, how == "enabled")
    model = integration.accelerate(model).to(torch.float64).to(dtype)
    x = normal(5, 144, dtype=dtype)
    assert not made
    model(x).sum().backward()
    model.merge_adapter(), model.unmerge_adapter(), model(x)
    assert len(made) == 1


REPLACE = {
    "assigned": lambda stores, tensors: [s.__setitem__("default", t) for s, t in zip(stores, tensors, strict=True)],
    # as accelerate moves buffers
    "buffers": lambda stores, tensors: [s._buffers.update(default=t) for s, t in zip(stores, tensors, strict=True)],
    "loaded": lambda stores, tensors: [s.load_state_dict({"default": t}) for s, t in zip(stores, tensors, strict=True)],
}


@pytest.mark.parametrize("how", REPLACE)
@kinds
def test_follows_bases_that_are_replaced(kind, how):
    """In training and through the inference cache: by other signs, other magnitudes, dense ones, ternary ones again."""
    model, x = model_of(kind), normal(5, 144)
    layer, stores = inner(model).a, (model.base_model.randlora_A, model.base_model.randlora_B)
    first = bases(model)
    dense = tuple(normal(*t.shape, seed=i) for i, t in enumerate(first))
    for tensors in (tuple(1.5 * t.flip(0) for t in first), dense, first):
        with torch.no_grad():
            layer.eval()(x), layer(x)
            before = layer(x)
        old = weakref.ref(layer._pair("default").bases)
        REPLACE[how](stores, tensors)
        lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        update = reference_dW(*tensors, lam, gamma, layer.scaling["default"], 144, 170).detach()
        exact = (layer.base_layer(x).double() + x.double() @ update.T).detach().float()
        assert not torch.allclose(before, exact, rtol=0.1, atol=0.1)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(layer(x), exact, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(layer.train()(x), exact, rtol=1e-4, atol=1e-3)
        assert (layer.pattern("default") is None) == (tensors is dense)
        gc.collect()
        assert old() is None, "nor are they kept, or their pattern"


@over("dtype", (torch.float32, torch.bfloat16, torch.float16))
@kinds
def test_merge_and_unmerge(kind, dtype):
    model = model_of(kind, dtype)
    kept = {name: getattr(inner(model), name) for name in SHAPES}
    before = {name: layer.base_layer.weight.clone() for name, layer in kept.items()}
    model.merge_adapter(safe_merge=True)
    for name, layer in kept.items():
        lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        update = reference_dW(
            *bases(model), lam, gamma, layer.scaling["default"], layer.in_features, layer.out_features
        )
        exact, eps = before[name].double() + update.detach(), torch.finfo(dtype).eps
        assert not torch.equal(layer.base_layer.weight, before[name])
        torch.testing.assert_close(layer.base_layer.weight.double(), exact, rtol=eps, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, before[name]) for name, layer in kept.items())


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
@kinds
def test_kept_for_backward(kind, mode):
    model = model_of(kind, torch.bfloat16 if mode == "bf16" else torch.float32)
    layer, x = inner(model).a, normal(64, 144, dtype=torch.bfloat16 if mode == "bf16" else torch.float32)
    known = [*layer.parameters(), *layer.pattern("default")]
    with SavedBytes(known) as saved, torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        layer(x.requires_grad_())
    assert [t.data_ptr() for _, t in saved.storages.values()] == [x.data_ptr()]


@pytest.mark.parametrize("copied", ["deepcopy", "torch.save"])
@kinds
def test_copies(kind, copied):
    """They have bases and a pattern of their own; files hold no pattern."""
    model, x = model_of(kind), normal(5, 144)

    def file():
        torch.save(model, buffer := io.BytesIO())
        return buffer.getvalue()

    size, before = len(file()), model(x)
    assert len(file()) - size < 1024  # layers note that they were called
    other = copy.deepcopy(model) if copied == "deepcopy" else torch.load(io.BytesIO(file()), weights_only=False)
    theirs, ours = (inner(m).a._pair("default").bases for m in (model, other))
    assert ours is not theirs and not ours.copies.packed
    randomize(model, seed=50)
    assert torch.equal(other(x), before) and len(inner(other).a.pattern("default")) == KINDS[kind]


@kinds
def test_every_strategy_takes_the_pattern(kind):
    model, x = model_of(kind), normal(5, 144)
    layer, outputs = inner(model).a, {}
    for strategy in ("materialized", "merged", "factored"):
        layer.strategy = strategy
        with Ops() as ops:
            outputs[strategy] = layer(x)
        assert ops.called == {("linear", KINDS[kind])}
        torch.testing.assert_close(outputs[strategy], outputs["materialized"], rtol=1e-4, atol=1e-4)
    first, second = layer.get_scaled_bases("default")
    update = torch.nn.functional.linear(torch.nn.functional.linear(x, first), second) * layer.scaling["default"]
    torch.testing.assert_close(layer.base_layer(x) + update, outputs["merged"], rtol=1e-4, atol=1e-4)


@kinds
def test_compile(kind):
    """One graph of layers of several sizes: patterns are made while it is traced, again when bases were replaced."""
    torch._dynamo.reset()
    model, x = model_of(kind), normal(5, 144)
    compiled = torch.compile(inner(model), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert held(model)[1] == 0
        got = compiled(x)
        assert held(model) == (1, 1)
        torch.testing.assert_close(got, inner(copy.deepcopy(model))(x), rtol=1e-5, atol=1e-5)
        expected = [torch.autograd.grad(y.sum(), trained(m)) for m, y in ((model, got), (model, inner(model)(x)))]
        for a, b in zip(*expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for store in (model.base_model.randlora_A, model.base_model.randlora_B):
            store["default"] = 1.25 * store["default"].flip(0)


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.cuda
@kinds
def test_moved_to_cuda(kind):
    """Whatever form pays there, and back."""
    model, x = model_of(kind), normal(5, 144)
    expected = model(x)
    model.cuda()
    torch.testing.assert_close(model(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-3)
    assert inner(model.cpu()).a.pattern("default") is not None
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
