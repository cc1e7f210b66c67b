"""Merging into quantised weights and taking it out again."""

import copy
import warnings

import pytest
import torch
from helpers.common import make_bases, normal, randomize, reference_update
from helpers.quantized_layers import (
    DTYPES,
    HERE,
    HQQLinear,
    allowed,
    ao,
    assert_same_weight,
    bnb,
    can_be_copied,
    exact_forward,
    kernels,  # noqa: F401
    make_base,
    make_layer,
    needs_ao,
    needs_bnb,
    over_kinds,
    over_shapes,
    parts,
    relative_error,
    same,
    step,
)  # fmt: skip
from torch import nn

import randlora
from randlora.layers import quantized
from randlora.layers.quantized import ao as ao_kinds

pytestmark = pytest.mark.filterwarnings("ignore:merging into")


@over_kinds
@over_shapes
@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
def test_merge_and_unmerge(kind, shape, safe):
    """PEFT raises for layers that are not square and merges something else into those that are (fact 9)."""
    layer = make_layer(kind, *shape)
    x = normal(3, shape[0])
    layer(x)
    before, held = parts(layer.base_layer), quantized.held_by(layer.base_layer)
    exact = quantized.dequantize(layer.base_layer).double() + reference_update(layer)
    with pytest.warns(UserWarning, match="merging into .* rounds them again: relative error of the update") as caught:
        layer.merge(safe_merge=safe)
    assert len(caught) == 1 and caught[0].filename == __file__
    got = quantized.dequantize(layer.base_layer).double()
    assert (got - exact).abs().max() <= step(kind) * exact.abs().max()
    error = ((got - exact).norm() / reference_update(layer).norm()).item()
    assert float(str(caught[0].message).rsplit(" ", 1)[1]) == pytest.approx(error, rel=0.06)
    assert layer.merged and type(quantized.held_by(layer.base_layer)) is type(held)
    assert set(layer.state_dict()) == set(make_layer(kind, *shape).state_dict())
    parameters = [part for part in (held.values() if isinstance(held, dict) else [held])]
    assert not any(p is parameter for p in layer.parameters() for parameter in parameters)
    merged = nn.functional.linear(x.double(), got, layer.bias.double()).detach()
    for mode in (True, False):
        layer.train(mode)
        assert relative_error(layer(x), merged) <= max(allowed(kind, torch.float32), 2e-2 * (kind == "8bit"))
    layer.unmerge()
    assert not layer.merged and same(quantized.held_by(layer.base_layer), held)
    assert_same_weight(layer.base_layer, before)
    assert relative_error(layer.train()(x), exact_forward(layer, x)) <= allowed(kind, torch.float32)


@over_kinds
@over_shapes
def test_merge_of_hadamard_bases(kind, shape):
    layer = make_layer(kind, *shape, bases=make_bases(*shape, 5, kind="hadamard"))
    before = parts(layer.base_layer)
    exact = quantized.dequantize(layer.base_layer).double() + reference_update(layer)
    layer.bases["default"] = make_bases(*shape, 5, kind="hadamard")
    layer.merge()
    assert (quantized.dequantize(layer.base_layer).double() - exact).abs().max() <= step(kind) * exact.abs().max()
    assert layer.bases["default"].nbytes < 50, "dense bases were made"
    layer.unmerge()
    assert_same_weight(layer.base_layer, before)


@over_kinds
def test_several_merges_round_once(kind):
    layer, together = make_layer(kind), make_layer(kind)
    for one in (layer, together):
        one.update_layer("second", r=3, randlora_alpha=0.15, bases=make_bases(41, 24, 3))
        randomize(one).set_adapter(["default", "second"])
    before = parts(layer.base_layer)
    together.merge()
    layer.merge(adapter_names=["second"])
    mixed = quantized.dequantize(layer.base_layer).double() + reference_update(layer)
    expected = nn.functional.linear(normal(7, 41).double(), mixed, layer.bias.double()).detach()
    assert relative_error(layer(normal(7, 41)), expected) <= allowed(kind, torch.float32)
    layer.merge(adapter_names=["default"])
    assert layer.merged_adapters == ["second", "default"]
    torch.testing.assert_close(*(quantized.dequantize(one.base_layer) for one in (layer, together)))
    with pytest.raises(ValueError, match="'second' is merged"):
        layer.delete_adapter("second")
    layer.enable_adapters(False)
    y = layer(normal(7, 41))
    assert_same_weight(layer.base_layer, before)
    assert not layer.merged and torch.equal(y, layer.base_layer(normal(7, 41)))
    layer.delete_adapter("second")


@over_kinds
def test_safe_merge_of_a_broken_adapter_changes_nothing(kind):
    layer = make_layer(kind)
    before, held = parts(layer.base_layer), quantized.held_by(layer.base_layer)
    with torch.no_grad():
        layer.randlora_gamma["default"][0, 0] = float("inf")
    with pytest.raises(ValueError, match="default gives NaN or infinity in the weight; nothing was changed"):
        layer.merge(safe_merge=True)
    assert not layer.merged and same(quantized.held_by(layer.base_layer), held)
    assert_same_weight(layer.base_layer, before)


@over_kinds
def test_a_zero_update_changes_no_bit(kind):
    layer = randlora.Linear(make_base(kind), r=5)
    before = parts(layer.base_layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer.merge()
    assert layer.merged
    assert_same_weight(layer.base_layer, before)
    layer.unmerge()
    assert_same_weight(layer.base_layer, before)


@over_kinds
def test_merging_does_not_touch_recorded_graphs(kind):
    layer = make_layer(kind)
    x = normal(3, 41).requires_grad_()
    expected = (quantized.dequantize(layer.base_layer).double() + reference_update(layer)).sum(0).expand(3, -1)
    y = layer(x)
    layer.merge()
    layer(normal(3, 41))
    y.sum().backward()
    assert relative_error(x.grad, expected) < 1e-6


@pytest.mark.parametrize(
    "kind, dtype",
    # Moved to another dtype, transformers' FP8Linear loses its scales; the others here keep theirs.
    [
        (kind, dtype)
        for kind in HERE
        for dtype in DTYPES
        if not kind.startswith("fp8")
        and can_be_copied(kind)
        and (dtype == torch.float32 or not kind.startswith(("float8", "cast", "hqq", "quanto")))
    ],
    ids=str,
)
def test_moving_and_copying_while_merged(kind, dtype):
    layer, bare = make_layer(kind), make_base(kind)
    layer(normal(3, 41)), bare(normal(3, 41))
    layer.merge()
    twin = copy.deepcopy(layer)
    expected = layer(normal(3, 41))
    assert torch.equal(twin(normal(3, 41)), expected)
    held, other = (quantized.held_by(one.base_layer) for one in (layer, twin))
    assert type(held) is type(other) and not same(held, other)
    bare.to(dtype)
    for one in (layer, twin):
        one.to(dtype)
        one.unmerge()
        assert_same_weight(one.base_layer, parts(bare))
        x = normal(3, 41, dtype=dtype)
        assert relative_error(one(x), exact_forward(one, x)) <= allowed(kind, dtype)


@needs_ao
def test_torchao_weights_of_unknown_settings_merge_into_floats(monkeypatch):
    layer = make_layer("int8", dtype=torch.bfloat16)
    before, parameter = parts(layer.base_layer), layer.weight
    exact = quantized.dequantize(layer.base_layer).double() + reference_update(layer)
    monkeypatch.delitem(ao_kinds.TORCHAO_KINDS, "Int8Tensor")
    with pytest.warns(UserWarning, match=r"Int8Tensor cannot be quantised again .*stays in torch.bfloat16, 0.0 MiB"):
        layer.merge()
    assert type(layer.weight) is nn.Parameter
    assert (layer.weight == exact.to(torch.bfloat16)).double().mean() > 0.99
    x = normal(3, 41, dtype=torch.bfloat16)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.update_layer("second", r=3, randlora_alpha=0.15, bases=make_bases(41, 24, 3))
    randomize(layer)
    with pytest.warns(UserWarning, match="cannot be quantised again"):
        layer.merge(adapter_names=["second"])
    layer.unmerge()
    assert layer.weight is parameter
    assert_same_weight(layer.base_layer, before)


@needs_ao
def test_torchao_nf4():
    """An older kind of tensor, for sizes of whole blocks only."""
    base = nn.Linear(64, 96)
    base.weight = nn.Parameter(ao.to_nf4(base.weight.detach(), 64, 32), requires_grad=False)
    layer = randomize(randlora.Linear(base, r=5, randlora_alpha=0.05, bases=make_bases(64, 96, 5)))
    x, parameter = normal(3, 64).requires_grad_(), layer.weight
    exact = quantized.dequantize(base).double() + reference_update(layer)
    y = layer(x)
    y.sum().backward()
    assert relative_error(y, exact_forward(layer, x.detach())) < 1e-6
    assert relative_error(x.grad, exact.sum(0).expand(3, -1)) < 1e-6
    layer.merge()
    got = quantized.dequantize(base).double()
    assert type(layer.weight) is type(parameter) and layer.weight.block_size == 64
    assert (got - exact).abs().max() <= exact.abs().max() / 3
    assert relative_error(layer(x), nn.functional.linear(x.double(), got, base.bias.double()).detach()) < 1e-6
    layer.unmerge()
    assert layer.weight is parameter


@needs_bnb
def test_8bit_layers_that_keep_float_weights():
    """has_fp16_weights: quantised at every training call, cached in eval mode."""
    base = bnb.nn.Linear8bitLt(41, 24).to("cpu").eval()
    layer = randomize(randlora.Linear(base, r=5, randlora_alpha=0.25, bases=make_bases(41, 24, 5))).eval()
    x, before = normal(3, 41), base.weight.detach().clone()
    expected = exact_forward(layer, x)
    assert relative_error(layer(x), expected) < 2e-2
    layer.merge()
    torch.testing.assert_close(base.weight.double(), before.double() + reference_update(layer))
    assert relative_error(layer(x), expected) < 2e-2
    layer.unmerge()
    assert torch.equal(base.weight, before)
    assert relative_error(layer(x), expected) < 2e-2


def test_weights_of_other_dtypes_are_refused():
    layer = randlora.Linear(nn.Linear(8, 8), r=2)
    randomize(layer)
    layer.base_layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(TypeError, match=r"the base weight's dtype must be one of .* got torch.float8_e4m3fn"):
        layer.merge()


@pytest.mark.parametrize("what", ["scale", "mask"])
def test_casts_that_do_more_are_not_merged_into(what):
    base = make_base("cast-e4m3fn")
    if what == "scale":
        base.register_forward_hook(lambda module, args, y: 3 * y)
    else:
        base.register_forward_pre_hook(lambda module, args: (args[0] * (torch.arange(41) % 2),))
    layer = randomize(randlora.Linear(base, r=5, randlora_alpha=0.25, bases=make_bases(41, 24, 5)))
    before, expected = parts(base), layer(normal(3, 41))
    with pytest.raises(ValueError, match="with hooks, does more than multiply by its weight: adding to"):
        layer.merge()
    assert_same_weight(base, before)
    assert not layer.merged and torch.equal(layer(normal(3, 41)), expected)


def test_numbers_that_are_too_large_for_8_bits():
    """torch makes NaN of them."""
    layer = make_layer("cast-e4m3fn")
    with torch.no_grad():
        layer.randlora_lambda["default"].mul_(1e6)
    layer.merge(safe_merge=True)
    assert layer.weight.float().abs().max() == torch.finfo(torch.float8_e4m3fn).max


@over_kinds
def test_merging_in_inference_mode(kind):
    """The weight is an ordinary tensor all the same, which backward may save."""
    layer, twin = make_layer(kind), make_layer(kind)
    before = parts(layer.base_layer)
    twin.merge()
    with torch.inference_mode():
        layer.merge()
    assert_same_weight(layer.base_layer, parts(twin.base_layer))
    assert not any(parameter.is_inference() for parameter in layer.parameters())
    with torch.inference_mode():
        layer.unmerge()
    assert_same_weight(layer.base_layer, before)


@pytest.mark.skipif(HQQLinear is None, reason="hqq is not installed")
def test_hqq_has_a_weight_that_is_none(monkeypatch):
    """transformers gives HQQ's layers an empty property of this name, for models that ask it for its dtype."""
    monkeypatch.setattr(HQQLinear, "weight", property(lambda self: torch.empty(0)), raising=False)
    layer = make_layer("hqq8")
    before = [part.clone() for part in parts(layer.base_layer)]
    layer.merge()
    assert layer.merged
    layer.unmerge()
    assert all(map(torch.equal, parts(layer.base_layer), before))
