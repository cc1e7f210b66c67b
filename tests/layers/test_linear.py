"""randlora.Linear: its mathematics, its adapters, its state."""

import copy
import pickle

import pytest
import torch
from helpers.common import (
    HALVES,
    make_base,
    make_bases,
    make_layer,
    normal,
    on_devices,
    over,
    randomize,
    reference_forward,
    reference_update,
)  # fmt: skip
from torch import nn

import randlora

SHAPES = [(41, 24, 5), (24, 41, 5), (33, 33, 40), (3, 1, 4), (1, 1, 1), (1, 41, 2), (341, 100, 32)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}r{s[2]}")


def trained(module):
    return {name for name, p in module.named_parameters() if p.requires_grad}


# ---- mathematics ----


@on_devices
@shapes
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "nobias"])
def test_float64_parity(shape, bias, device):
    layer = make_layer(*shape, bias=bias, dtype=torch.float64, device=device)
    x = normal(2, 3, shape[0], dtype=torch.float64, device=device)
    torch.testing.assert_close(layer(x), reference_forward(layer, x), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.get_delta_weight("default"), reference_update(layer), rtol=1e-10, atol=1e-10)
    first, second = layer.get_scaled_bases("default")
    factored = nn.functional.linear(nn.functional.linear(x, first), second) * layer.scaling["default"]
    torch.testing.assert_close(layer.base_layer(x) + factored, layer(x), rtol=1e-10, atol=1e-10)


@on_devices
@over("dtype", HALVES)
def test_16_bit_weights_get_fp32_parameters(dtype, device):
    layer = make_layer(41, 24, dtype=dtype, device=device)
    assert {p.dtype for name, p in layer.named_parameters() if "randlora" in name} == {torch.float32}
    x = normal(7, 41, dtype=dtype, device=device)
    y, exact = layer(x), reference_forward(layer, x)
    assert y.dtype == dtype
    assert ((y.double() - exact).norm() / exact.norm()).item() < 2 * torch.finfo(dtype).eps
    y.sum().backward()
    assert layer.randlora_lambda["default"].grad.dtype == torch.float32


def test_standard_initialisation_changes_nothing():
    layer = randlora.Linear(make_base(41, 24), r=5)
    x = normal(7, 41)
    assert torch.equal(layer(x), layer.base_layer(x))
    n, m = layer.randlora_gamma["default"].shape
    assert (layer.randlora_gamma["default"] == 1 / max(n, m)).all()
    assert (layer.randlora_lambda["default"] == 0).all()


def test_without_initialisation_it_is_random():
    layer = randlora.Linear(make_base(41, 24), r=5, init_weights=False)
    assert layer.randlora_lambda["default"].std() > 0.5
    assert (layer.randlora_gamma["default"] == 1 / 41).all()


@pytest.mark.parametrize("num_bases", [1, 3, None])
def test_rank_of_the_update(num_bases):
    layer = make_layer(41, 24, 5, num_bases=num_bases, dtype=torch.float64)
    assert torch.linalg.matrix_rank(layer.get_delta_weight("default")) == min(24, 5 * (num_bases or 5))


def test_dropout_only_in_training():
    layer = make_layer(41, 24, randlora_dropout=0.5)
    x = normal(7, 41)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x).double(), reference_forward(layer, x), rtol=1e-4, atol=1e-4)


# ---- adapters ----


def several():
    """A layer with three adapters that differ in everything."""
    layer = make_layer(41, 24, 5, dtype=torch.float64)
    layer.update_layer("sparse", r=8, randlora_alpha=4, bases=make_bases(41, 24, 8, kind="sparse", seed=3))
    layer.update_layer("few", r=8, randlora_alpha=2, randlora_dropout=0.25, num_bases=2)
    return randomize(layer)


def test_adapters_of_different_rank_live_side_by_side():
    """PEFT keeps one number of bases per layer, so the second adapter breaks the first (fact 12)."""
    layer = several()
    assert layer.r == {"default": 5, "sparse": 8, "few": 8}
    assert layer.num_bases == {"default": 5, "sparse": 3, "few": 2}
    x = normal(7, 41, dtype=torch.float64)
    layer.eval()
    for names in (["default"], ["sparse"], ["few"], ["default", "few"], ["few", "sparse", "default"]):
        layer.set_adapter(names)
        assert layer.active_adapters == names
        torch.testing.assert_close(layer(x), reference_forward(layer, x, names), rtol=1e-10, atol=1e-10)


def test_the_second_adapter_has_its_own_bases():
    """PEFT silently reuses the first adapter's bases (fact 13)."""
    layer = several()
    assert not torch.equal(layer.randlora_A["sparse"][:5], layer.randlora_A["default"][:, :, :24])
    assert layer.randlora_A["sparse"].unique().numel() == 3 and layer.randlora_A["default"].unique().numel() > 100


def test_which_parameters_train():
    layer = several()
    assert trained(layer) == {"randlora_lambda.default", "randlora_gamma.default"}
    layer.set_adapter(["few", "sparse"])
    both = {f"randlora_{p}.{a}" for p in ("lambda", "gamma") for a in ("few", "sparse")}
    assert trained(layer) == both
    layer.set_adapter("few", inference_mode=True)
    assert trained(layer) == set() and layer.active_adapter == "few"
    layer.set_adapter("few")
    layer.enable_adapters(False)
    assert trained(layer) == set() and layer.disable_adapters
    x = normal(7, 41, dtype=torch.float64)
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.enable_adapters(True)
    assert trained(layer) == {"randlora_lambda.few", "randlora_gamma.few"}
    assert not torch.equal(layer(x), layer.base_layer(x))


def test_deleting():
    layer = several()
    layer.delete_adapter("sparse")
    assert layer.active_adapters == ["default"] and "randlora_lambda.sparse" not in layer.state_dict()
    with pytest.warns(UserWarning, match="'default' was deleted; 'few' is active now"):
        layer.delete_adapter("default")
    assert trained(layer) == {"randlora_lambda.few", "randlora_gamma.few"}
    layer.delete_adapter("few")
    x = normal(7, 41, dtype=torch.float64)
    assert layer.active_adapters == [] and torch.equal(layer(x), layer.base_layer(x))
    layer.update_layer("new", r=3)
    assert layer.active_adapters == ["new"]
    with pytest.raises(ValueError, match="no adapter named 'few'; it has: new"):
        layer.delete_adapter("few")


def test_base_is_frozen_and_the_input_gets_its_gradient():
    layer = make_layer(41, 24)
    x = normal(7, 41).requires_grad_()
    layer(x).sum().backward()
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is None
    assert all(p.grad is not None for name, p in layer.named_parameters() if name in trained(layer))
    torch.testing.assert_close(
        x.grad.double(), (layer.weight.double() + reference_update(layer)).sum(0).expand(7, 41), rtol=1e-4, atol=1e-4
    )


# ---- bases ----


def test_layers_share_one_store():
    first, second = randlora.Linear(make_base(41, 24), r=5), randlora.Linear(make_base(64, 96), r=5)
    randomize(first)
    x = normal(7, 41)
    before = first(x)
    pair = [layer.bases["default"].tensors(torch.float32, torch.device("cpu")) for layer in (first, second)]
    assert pair[0][0].data_ptr() == pair[1][0].data_ptr() and pair[0][1].data_ptr() == pair[1][1].data_ptr()
    third = randlora.Linear(make_base(128, 200), r=5)
    assert third.bases["default"] is first.bases["default"]
    assert torch.equal(first(x), before), "a larger layer must not change a smaller one's values"


@pytest.mark.parametrize("form", ["tensor", "dict", "BufferDict"])
def test_given_bases(form):
    A, B = normal(5, 1, 50, seed=20), normal(60, 12, 5, seed=21)
    wrap = {"tensor": lambda t: t, "dict": lambda t: {"default": t}}
    if form == "BufferDict":
        BufferDict = pytest.importorskip("peft.tuners._buffer_dict").BufferDict
        wrap["BufferDict"] = lambda t: BufferDict({"default": t})
    layer = make_layer(41, 24, 5, randlora_A=wrap[form](A), randlora_B=wrap[form](B))
    assert layer.randlora_A["default"] is A and layer.randlora_B["default"] is B
    x = normal(7, 41)
    torch.testing.assert_close(layer(x).double(), reference_forward(layer, x), rtol=1e-4, atol=1e-4)


BAD = [
    ({"base_layer": nn.Conv2d(1, 1, 1)}, TypeError, "base_layer must be a linear layer: a torch.nn.Linear.*got Conv2d"),
    ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    ({"r": 2.5}, TypeError, "r must be an integer, got 2.5"),
    ({"randlora_alpha": "x"}, TypeError, "randlora_alpha must be a number or 'auto', got 'x'"),
    ({"randlora_alpha": float("nan")}, ValueError, "randlora_alpha must be finite, got nan"),
    ({"randlora_dropout": 1.0}, ValueError, "randlora_dropout must be at least 0 and below 1, got 1.0"),
    ({"num_bases": 0}, ValueError, "num_bases must be at least 1, got 0"),
    ({"adapter_name": "a.b"}, ValueError, "adapter_name must not .* contain .*, got 'a.b'"),
    ({"randlora_A": normal(5, 1, 24)}, ValueError, "must be given together, got only randlora_A"),
    ({"randlora_A": normal(5, 1, 23), "randlora_B": normal(41, 5, 5)}, ValueError, r"\[5, 1, 24\].*\[5, 1, 23\]"),
    ({"randlora_A": {}, "randlora_B": {}}, ValueError, "randlora_A has no entry for .*; it has: none"),
    ({"randlora_A": normal(4, 1, 24), "randlora_B": normal(41, 6, 4)}, ValueError, "its bases have r = 4"),
    ({"bases": 3}, TypeError, "bases must be randlora.RandomBases, got int"),
    ({"init_weights": "gaussian"}, TypeError, "init_weights must be True or False, got 'gaussian'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"), BAD, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_bad_arguments_change_nothing(change, error, message):
    base = make_base(41, 24)
    with pytest.raises(error, match=message):
        randlora.Linear(**({"base_layer": base, "r": 5} | change))
    assert all(p.requires_grad for p in base.parameters())
    layer = make_layer(41, 24, 5)
    before = repr(layer), set(layer.state_dict())
    if "base_layer" not in change:
        with pytest.raises(error, match=message):
            layer.update_layer(**{"adapter_name": "second", "r": 5} | change)
    assert (repr(layer), set(layer.state_dict())) == before


def test_wrapping_twice_and_naming_twice():
    layer = make_layer()
    with pytest.raises(TypeError, match=r"adapted already.*update_layer"):
        randlora.Linear(layer)
    with pytest.raises(ValueError, match="already has an adapter named 'default'"):
        layer.update_layer("default")


# ---- state ----


def test_state_dict_round_trip():
    layer = several()
    state = layer.state_dict()
    parameters = {f"randlora_{p}.{a}" for p in ("lambda", "gamma") for a in ("default", "sparse", "few")}
    assert set(state) == {"base_layer.weight", "base_layer.bias"} | parameters
    other = several()
    randomize(other, seed=100)
    other.load_state_dict(state)
    layer.eval(), other.eval()
    x = normal(7, 41, dtype=torch.float64)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
                         ids=["deepcopy", "pickle"])  # fmt: skip
@pytest.mark.parametrize("merged", [False, True])
def test_copies(duplicate, merged):
    layer = randomize(randlora.Linear(make_base(41, 24), r=5, randlora_alpha=7))
    if merged:
        layer.merge()
    other = duplicate(layer)
    x = normal(7, 41)
    assert torch.equal(layer(x), other(x))
    assert other.bases["default"] is layer.bases["default"], "copies share their bases"
    with torch.no_grad():
        other.randlora_lambda["default"].zero_()
        other.weight.zero_()
    torch.testing.assert_close(layer(x).double(), reference_forward_of(layer, x, merged), rtol=1e-4, atol=1e-4)
    if merged:
        other.unmerge()
        assert other.weight.abs().sum() > 0


def reference_forward_of(layer, x, merged):
    return reference_forward(layer, x, () if merged else ("default",))


def test_pickled_bases_are_a_few_numbers():
    layer = make_layer(1000, 341, 32)
    size = len(pickle.dumps(layer)) - sum(p.nbytes for p in layer.parameters())
    assert size < 10_000
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again.randlora_B["default"], layer.randlora_B["default"])


@over("dtype", (torch.float64, torch.bfloat16, torch.float16))
def test_to_dtype(dtype):
    layer = make_layer(41, 24).to(dtype)
    x = normal(7, 41, dtype=dtype)
    y, exact = layer(x), reference_forward(layer, x)
    assert y.dtype == dtype
    assert ((y.double() - exact).norm() / exact.norm()).item() < max(4 * torch.finfo(dtype).eps, 1e-12)


@pytest.mark.cuda
def test_to_device():
    layer, x = make_layer(41, 24), normal(7, 41)
    expected = layer(x)
    torch.testing.assert_close(layer.cuda()(x.cuda()).cpu(), expected, rtol=1e-4, atol=1e-4)


def test_repr_says_what_it_is():
    layer = several()
    text = repr(layer)
    assert text.startswith("randlora.Linear(")
    for part in ("in_features=41, out_features=24", "default: r=5, num_bases=5, alpha=7.5, kind=dense",
                 "sparse: r=8, num_bases=3, alpha=4, kind=sparse", "active=['default']"):  # fmt: skip
        assert part in text
    layer.merge()
    assert "merged=['default']" in repr(layer)


def test_the_names_of_pefts_page():
    assert issubclass(randlora.UniqueBaseGrad, torch.autograd.Function)
    assert issubclass(randlora.Linear, nn.Linear) and issubclass(randlora.Linear, randlora.RandLoraLayer)
    assert randlora.RandLoraLayer.adapter_layer_names == ("randlora_lambda", "randlora_gamma")
    assert {"randlora_A", "randlora_B"} <= set(randlora.RandLoraLayer.other_param_names)
    layer = make_layer()
    for name in ("update_layer", "get_scaled_bases", "get_delta_weight", "merge", "unmerge", "set_adapter",
                 "get_base_layer", "reset_randlora_parameters"):  # fmt: skip
        assert callable(getattr(layer, name))
    assert layer.weight is layer.base_layer.weight and layer.bias is layer.base_layer.bias
