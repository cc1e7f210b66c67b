"""Merging into the base weight and taking it out again."""

import pytest
import torch
from helpers.common import FLOATS, make_layer, normal, on_devices, over, randomize, reference_forward, reference_update
from torch import nn

import randlora
from randlora.layers import merging, unmerging


@on_devices
@over("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(41, 24), (24, 41), (33, 33)], ids=str)
@pytest.mark.parametrize("safe", [False, True], ids=["plain", "safe"])
def test_merge_and_unmerge(shape, dtype, safe, device):
    """PEFT's 16-bit unmerge does not give the weight back (fact 16)."""
    layer = make_layer(*shape, dtype=dtype, device=device)
    before, exact = layer.weight.detach().clone(), layer.weight.double() + reference_update(layer)
    pointer = layer.weight.data_ptr()
    layer.merge(safe_merge=safe)
    assert layer.merged and layer.merged_adapters == ["default"] and layer.weight.data_ptr() == pointer
    if dtype in (torch.bfloat16, torch.float16):
        # fp32 arithmetic rounded once: almost always the nearest number of the dtype.
        assert (layer.weight == exact.to(dtype)).double().mean() > 0.99
    else:
        torch.testing.assert_close(layer.weight.double(), exact.detach(), rtol=1e-5, atol=1e-5)
    x = normal(7, shape[0], dtype=dtype, device=device)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    layer.unmerge()
    assert not layer.merged and torch.equal(layer.weight, before)


@over("dtype", FLOATS)
def test_two_merges_one_unmerge(dtype):
    layer = make_layer(41, 24, dtype=dtype)
    layer.update_layer("second", r=3, randlora_alpha=3)
    randomize(layer)
    before = layer.weight.detach().clone()
    layer.merge()
    layer.merge(adapter_names=["second"])
    assert layer.merged_adapters == ["default", "second"]
    with pytest.warns(UserWarning, match="already merged, left out: second"):
        layer.merge(adapter_names=["second"])
    with pytest.raises(ValueError, match=r"'second' is merged.*unmerge\(\) first"):
        layer.delete_adapter("second")
    with torch.no_grad():
        layer.randlora_lambda["default"].add_(1)  # what happens to the parameters meanwhile makes no difference
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_safe_merge_of_a_broken_adapter_changes_nothing():
    layer = make_layer()
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.randlora_lambda["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="default gives NaN or infinity in the weight; nothing was changed"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(layer.weight, before)


def test_disabling_takes_merged_adapters_out():
    layer = make_layer()
    before, x = layer.weight.detach().clone(), normal(7, 41)
    layer.merge()
    layer.enable_adapters(False)
    assert torch.equal(layer(x), nn.functional.linear(x, before, layer.bias))
    assert not layer.merged


def test_merge_of_nothing_and_of_strangers():
    layer = make_layer()
    layer.merge(adapter_names=[])
    assert not layer.merged
    with pytest.raises(ValueError, match="no adapter named 'other'; it has: default"):
        layer.merge(adapter_names=["other"])


@over("dtype", (torch.float64, torch.bfloat16))
def test_moving_while_merged(dtype):
    layer = make_layer()
    before = layer.weight.detach().clone()
    layer.merge()
    layer.to(dtype)
    layer.unmerge()
    assert torch.equal(layer.weight, before.to(dtype))


def test_the_kept_weight_is_in_no_file():
    layer = make_layer()
    keys = set(layer.state_dict())
    layer.merge()
    assert set(layer.state_dict()) == keys


def test_merged_output_equals_unmerged():
    layer = make_layer(dtype=torch.float64)
    x = normal(7, 41, dtype=torch.float64)
    expected = reference_forward(layer, x)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_active_adapters_that_are_not_merged_go_on_acting():
    layer = make_layer(41, 24, dtype=torch.float64)
    layer.update_layer("second", r=3, randlora_alpha=3)
    randomize(layer).set_adapter(["default", "second"])
    x = normal(7, 41, dtype=torch.float64)
    expected = reference_forward(layer, x, ["default", "second"])
    layer.merge(adapter_names="second")
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_inference_tensors_are_merged_into():
    """A model that was made in inference mode, and is used outside of it: in-place changes are refused there."""
    with torch.inference_mode():
        layer = randomize(randlora.Linear(nn.Linear(8, 6), r=2, randlora_alpha=3)).eval()
    x, before = normal(7, 8), layer.weight.clone()
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    assert not torch.equal(layer.weight, before)
    layer.unmerge()
    assert torch.equal(layer.weight, before) and torch.equal(layer(x), expected)


def test_layers_are_unmerged_where_their_weight_cannot_be_written(monkeypatch):
    """Not even for giving it back: a layer that called itself merged would leave its adapter out."""
    layers = [randomize(randlora.Linear(nn.Linear(8, 6), r=2, randlora_alpha=3)).eval() for _ in range(2)]
    x = normal(7, 8)
    expected, write = [layer(x) for layer in layers], unmerging.put_weight

    def failing(layer, value):
        if layer is layers[1]:
            raise RuntimeError("read-only")
        write(layer, value)

    for module in (merging, unmerging):
        monkeypatch.setattr(module, "put_weight", failing)
    with pytest.raises(RuntimeError, match="read-only"), unmerging.merged_or_not(layers[::-1]):
        layers[0].merge()
        layers[1].merge()
    assert not any(layer.merged for layer in layers)
    assert all(torch.equal(layer(x), y) for layer, y in zip(layers, expected, strict=True))
