"""Dense bases that are not kept: made anew in every pass, the same bits, and nothing of them left in between."""

import copy
import pickle

import pytest
import torch
from helpers.common import (
    FLOATS,
    STRATEGIES,
    make_base,
    make_bases,
    make_layer,
    normal,
    on_devices,
    over,
    randomize,
    reference_forward,
)
from helpers.counted import SavedBytes
from helpers.memory import peak
from helpers.models import IDS, net
from torch import nn

import randlora

shapes = pytest.mark.parametrize("shape", [(41, 24), (24, 41), (30, 30)], ids=str)


def layer_of(shape, seed=3, keep=True, **arguments):
    return make_layer(*shape, bases=make_bases(*shape, 5, seed=seed, keep=keep), **arguments)


def step(layer, x):
    """The result of a layer, and all gradients."""
    x = x.detach().requires_grad_()
    y = layer(x)
    trained = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad((y.double() ** 2).sum(), [x, *trained])]


# ---- values ----------------------------------------------------------------------------------------------------------


@on_devices
@over("dtype", FLOATS)
@pytest.mark.parametrize("strategy", ("auto", *STRATEGIES))
@shapes
def test_results_and_gradients_are_the_same_bits(shape, strategy, dtype, device):
    kept = layer_of(shape, seed=2**64 - 3, dtype=dtype, strategy=strategy, device=device)
    made = layer_of(shape, seed=2**64 - 3, dtype=dtype, strategy=strategy, device=device, keep=False)
    x = normal(7, shape[0], dtype=dtype, device=device)
    for a, b in zip(step(kept, x), step(made, x), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(kept.get_delta_weight("default"), made.get_delta_weight("default"))
    for a, b in zip(kept.get_scaled_bases("default"), made.get_scaled_bases("default"), strict=True):
        assert torch.equal(a, b)
    assert made.bases["default"].nbytes == 0 < kept.bases["default"].nbytes


@shapes
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("workspace", [0, 1, 700, 3000])
def test_a_layer_takes_part_of_larger_bases(shape, strategy, workspace):
    """In groups of bases where the workspace is small, which may begin in the midst of one: n is 5 or 6, and r is 5."""
    layers = [
        make_layer(*shape, dtype=torch.float64, strategy=strategy, bases=make_bases(50, 60, 5, seed=4, keep=keep))
        for keep in (True, False)
    ]
    for layer in layers:
        layer.workspace = workspace
    x = normal(7, shape[0], dtype=torch.float64)
    torch.testing.assert_close(layers[1](x), reference_forward(layers[1], x), rtol=1e-11, atol=1e-11)
    for a, b in zip(*(step(layer, x) for layer in layers), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_it_is_no_part_of_the_definition():
    kept, made = make_bases(41, 24, 5), make_bases(41, 24, 5, keep=False)
    assert kept.fingerprint() == made.fingerprint()
    assert pickle.loads(pickle.dumps(made)).keep and repr(made) == repr(kept)
    assert copy.deepcopy(made) is made
    assert not made.to(torch.bfloat16).keep
    assert torch.equal(made.A, kept.A) and torch.equal(made.B, kept.B) and made.nbytes == 0
    assert made.A is not made.A
    assert not made.to(device="meta").tensors()[1].is_cuda and made.pattern(24, torch.device("meta")) is None


def test_it_may_be_changed_at_any_time():
    layer = layer_of((41, 24))
    bases, x = layer.bases["default"], normal(7, 41)
    before = layer(x)
    whole = bases.nbytes
    for keep, nbytes in ((False, 0), (False, 0), (True, whole), (True, whole), (False, 0)):
        bases.keep = keep
        assert torch.equal(layer(x), before)
        assert (bases.keep, bases.nbytes) == (keep, nbytes)
    bases.require(80, 30, 9)  # grown bases have a pattern of their new size
    assert torch.allclose(layer(x), before)
    layer = randomize(randlora.Linear(make_base(80, 30), r=5, bases=bases, num_bases=9))
    y = layer(normal(2, 80))
    torch.testing.assert_close(y.double(), reference_forward(layer, normal(2, 80)), rtol=1e-4, atol=1e-4)


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_autograd_keeps_the_input_alone():
    layer, x = layer_of((64, 96), keep=False), normal(50, 64).requires_grad_()
    with SavedBytes(layer.parameters()) as saved:
        y = layer(x)
    assert [t.data_ptr() for _, t in saved.storages.values() if t.nbytes] == [x.data_ptr()]
    y.sum().backward()


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("training", [True, False])
def test_one_layers_bases_are_there_at_a_time(strategy, training):
    """Of a chain of layers, and exactly those: A and B of the store, which are kept otherwise."""
    found = []
    for keep in (True, False):
        bases = randlora.RandomBases(96, 64, 8, keep=keep)
        base = [make_base(64, 96, bias=False), make_base(96, 64, bias=False), make_base(64, 96, bias=False)]
        model = nn.Sequential(*(randomize(randlora.Linear(b, r=8, bases=bases, strategy=strategy)) for b in base))
        x = normal(50, 64).requires_grad_(training)
        trained = [p for p in model.parameters() if p.requires_grad]

        def call(model=model, x=x, trained=trained):
            with torch.set_grad_enabled(training):
                y = model(x)
                if training:
                    torch.autograd.grad(y.sum(), [x, *trained])

        found.append(peak(call))
        assert bases.nbytes == (4 * (8 * 64 + 96 * 64) if keep else 0)
    assert found[1] - found[0] == 4 * (8 * 64 + 96 * 64)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_workspace_bounds_what_is_made(strategy):
    """Of 16 rows of A at a time one, with the columns of B that it is multiplied with: 1/16, and the rest of a base."""
    found = []
    for keep in (True, False):
        layer = make_layer(128, 256, 16, strategy=strategy, bases=make_bases(128, 256, 16, keep=keep))
        layer.workspace = 1
        x = normal(2, 128).requires_grad_()
        found.append(peak(lambda layer=layer, x=x: step(layer, x)))
    M, n, r, m = 256, 8, 16, 128
    assert 0 < found[1] - found[0] <= 4 * (M * 2 * r + m) < 4 * M * n * r / 3


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_pass_makes_them_once(strategy):
    layer, x = layer_of((41, 24), strategy=strategy, keep=False), normal(7, 41)
    step(layer, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(layer, x)
    assert sum(event.name == "randlora::fill_bases_" for event in profile.events()) == 2 * 2  # A and B, in two passes


# ---- the rest of the world -------------------------------------------------------------------------------------------


def test_compiled_and_exported():
    layer = layer_of((41, 24), keep=False)
    x = normal(7, 41)
    expected = step(layer, x)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for a, b in zip(step(compiled, x), expected, strict=True):
        assert torch.equal(a, b)
    compiled(normal(9, 41))
    layer.bases["default"].keep = True  # the graph is made anew
    assert torch.equal(compiled(x), expected[0]) and layer.bases["default"].nbytes > 0
    layer.bases["default"].keep = False
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("tokens", min=2, max=99)},))
    assert torch.equal(program.module()(x), expected[0])
    assert layer.bases["default"].nbytes == 0


def test_saved_tensors_that_are_taken_away():
    layer, x = layer_of((41, 24), keep=False), normal(7, 41)
    expected = step(layer, x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy):
        assert all(torch.equal(a, b) for a, b in zip(step(layer, x), expected, strict=True))

    class Checkpointed(nn.Module):
        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

        parameters = layer.parameters

    assert all(torch.equal(a, b) for a, b in zip(step(Checkpointed(), x), expected, strict=True))


def test_autocast_merging_and_caches():
    layers = [layer_of((41, 24), keep=keep) for keep in (True, False)]
    x = normal(7, 41)
    results = []
    for layer in layers:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        layer.eval()
        with torch.no_grad(), randlora.inference_cache():
            cached = [layer(x) for _ in range(40)]
        with torch.inference_mode():
            inferred = layer(x)
        weight = layer.weight.clone()
        layer.merge()
        merged = layer(x)
        layer.unmerge()
        assert torch.equal(layer.weight, weight)
        results.append([y, cached[0], inferred, merged])
        for one in cached:  # an update is built the sooner, the more a call without it takes
            torch.testing.assert_close(one, inferred)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert layers[1].bases["default"].nbytes == 0


# ---- randlora.keep_bases ---------------------------------------------------------------------------------------------


def adapted(**settings):
    config = randlora.RandLoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], **settings)
    model = randlora.get_peft_model(net(), config)
    for layer in model.modules():
        if isinstance(layer, randlora.Linear):
            randomize(layer)
    return model


def test_a_model_gives_and_saves_the_same(tmp_path):
    model = adapted(projection_prng_key=77)
    (bases,) = {id(b): b for m in model.modules() if isinstance(m, randlora.Linear) for b in m.bases.values()}.values()
    before = model(IDS)
    before.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    model.save_pretrained(tmp_path / "kept")
    model.zero_grad()
    randlora.keep_bases(model, False)
    after = model(IDS)
    after.sum().backward()
    model.save_pretrained(tmp_path / "made")
    assert bases.nbytes == 0
    torch.testing.assert_close(after, before, rtol=1e-13, atol=1e-13)
    for a, b in zip(gradients, [p.grad for p in model.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "kept" / name).read_bytes() == (tmp_path / "made" / name).read_bytes()
    loaded = randlora.RandLoraModel.from_pretrained(net(), tmp_path / "made")  # its bases are the process's own
    assert torch.equal(loaded(IDS), after) and bases.nbytes == 0
    randlora.keep_bases(model)
    assert torch.equal(model(IDS), before) and bases.nbytes > 0


@pytest.mark.parametrize("kind", ["hadamard", "sparse", "very_sparse", "sign"])
def test_kinds_that_would_not_gain(kind):
    with pytest.raises(ValueError, match=rf"kind='{kind}' are kept in two bits per number or less, .* nothing to gain"):
        randlora.RandomBases(41, 24, 5, kind, keep=False)
    model = adapted(kind=kind)
    with pytest.raises(ValueError, match=r"the bases of adapter .default. stay as they are: .* nothing to gain"):
        randlora.keep_bases(model, False)
    randlora.keep_bases(model, True)  # as it is


def test_bases_that_cannot_be_made_from_indices():
    with pytest.raises(ValueError, match="drawn by prng='peft': they cannot be made again a part at a time"):
        randlora.RandomBases(41, 24, 5, prng="peft", keep=False)
    A, B = make_bases(41, 24, 5).draw(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match="were given as tensors: they cannot be made again"):
        randlora.RandomBases.from_tensors(A, B).keep = False
    layer = layer_of((41, 24))
    layer.update_layer("second", r=5, bases=randlora.RandomBases.from_tensors(A, B))
    with pytest.raises(ValueError, match="adapter 'second' stay as they are: these bases were given"):
        randlora.keep_bases(layer, False)
    assert layer.bases["default"].keep, "changed, though the other one was refused"
    randlora.keep_bases(layer, False, adapter_name="default")
    assert not layer.bases["default"].keep


def test_what_is_no_model_with_adapters():
    with pytest.raises(ValueError, match="a model with adapters, got a Linear without any adapted layer"):
        randlora.keep_bases(nn.Linear(3, 4), False)
    with pytest.raises(ValueError, match="without any adapter named 'other'"):
        randlora.keep_bases(layer_of((41, 24)), False, adapter_name="other")
    for wrong in (None, "no", 2):
        with pytest.raises(TypeError, match="keep must be True or False, got"):
            randlora.keep_bases(layer_of((41, 24)), wrong)
        with pytest.raises(TypeError, match="keep must be True or False, got"):
            randlora.RandomBases(4, 4, 2, keep=wrong)
