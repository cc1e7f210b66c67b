"""Dropout by counter: the mask follows from a seed and positions, and is drawn again instead of kept."""

import pytest
import torch
import torch.utils.checkpoint
from helpers.common import FLOATS, make_layer, normal, on_devices, over, reference_update
from helpers.dropout import reference_mask

_dropout = torch.ops.randlora.dropout


@on_devices
@over("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1,), (3,), (41, 7), (5, 341), (128,), (3, 127)], ids=str)
def test_mask_is_as_defined(shape, dtype, device):
    x = normal(*shape, dtype=dtype, device=device)
    seed = 0x123456789ABCDEF
    got = _dropout(x, torch.tensor([seed], device=device), 0.3)
    keep = reference_mask(x.numel(), seed, 0.3).view(shape).to(device)
    assert torch.equal(got != 0, keep & (x != 0))
    expected = (x.to(torch.float64 if dtype == torch.float64 else torch.float32) * (1 / 0.7) * keep).to(dtype)
    torch.testing.assert_close(got, expected)


@on_devices
def test_share_of_dropped_elements(device):
    x = torch.ones(1000, 1000, device=device)
    for p in (0.0, 0.1, 0.5, 0.9):
        dropped = (_dropout(x, torch.tensor([7], device=device), p) == 0).double().mean().item()
        assert abs(dropped - p) <= 5 * (p * (1 - p)) ** 0.5 / 1000


def test_thread_counts_agree():
    x, seed, threads = normal(37, 1001), torch.tensor([3]), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = _dropout(x, seed, 0.5)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, _dropout(x, seed, 0.5))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.ones(3, dtype=torch.int32), torch.tensor([1]), 0.5), TypeError, "x must be float64"),
        ((torch.ones(3), torch.tensor([1.0]), 0.5), TypeError, "seed must be int64, got Float"),
        ((torch.ones(3), torch.tensor([1, 2]), 0.5), ValueError, r"one element, got shape \[2\]"),
        ((torch.ones(3), torch.tensor([1]), 1.0), ValueError, "p must be at least 0 and below 1, got 1"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        _dropout(*arguments)


@on_devices
@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized"])
def test_layer_follows_manual_seed(strategy, device):
    layer = make_layer(41, 24, randlora_dropout=0.5, device=device, strategy=strategy)
    x = normal(6, 41, device=device)
    torch.manual_seed(5)
    first = layer(x)
    second = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@on_devices
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "nonreentrant"])
def test_checkpointing_draws_the_same_mask(reentrant, device):
    layer = make_layer(41, 24, randlora_dropout=0.5, dtype=torch.float64, device=device)
    x = normal(6, 41, dtype=torch.float64, device=device).requires_grad_()
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        inputs = (x, *layer.randlora_lambda.values(), *layer.randlora_gamma.values())
        for t in inputs:
            t.grad = None
        y.pow(2).sum().backward()
        results.append((y.detach(), *(t.grad for t in inputs)))
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@on_devices
def test_backward_uses_the_forward_mask(device):
    """The update is linear in x, so <g, y> = <dx, x> holds only if both directions draw one mask."""
    layer = make_layer(41, 24, bias=False, randlora_dropout=0.5, dtype=torch.float64, device=device)
    x = normal(6, 41, dtype=torch.float64, device=device).requires_grad_()
    y, g = layer(x), normal(6, 24, seed=3, dtype=torch.float64, device=device)
    (dx,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((dx * x).sum(), (g * y).sum(), rtol=1e-12, atol=1e-12)
    plain = torch.nn.functional.linear(x, layer.weight + reference_update(layer))
    assert not torch.allclose(y, plain)
