"""PEFT's own layer and op on the same bases and parameters: same outputs, same gradients."""

import pytest
import torch
from helpers.common import draw_factors, make_base, normal, over

import randlora

peft = pytest.importorskip("peft")
from peft.tuners.randlora import layer as peft_layer  # noqa: E402

SHAPES = [(41, 24), (24, 41), (33, 33)]


def pair(shape, r, dtype, alpha=3.0):
    """PEFT's layer and ours with PEFT's bases and the same random parameters, on equal base layers."""
    model = torch.nn.Sequential()
    model.add_module("layer", make_base(*shape, dtype=dtype))
    config = peft.RandLoraConfig(r=r, randlora_alpha=alpha, target_modules=["layer"])
    model = peft.get_peft_model(model, config).to(dtype)
    theirs, store = model.base_model.model.layer, model.base_model
    ours = randlora.Linear(make_base(*shape, dtype=dtype), "default", store.randlora_A, store.randlora_B, r, alpha)
    with torch.no_grad():
        for name, seed in (("randlora_lambda", 1), ("randlora_gamma", 2)):
            values = normal(*getattr(ours, name)["default"].shape, seed=seed, dtype=dtype)
            getattr(ours, name)["default"].copy_(values)
            getattr(theirs, name)["default"].copy_(values)
    return theirs, ours


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("r", [1, 5, 40])
@pytest.mark.parametrize("strategy", ["factored", "materialized", "merged"])
@over("dtype", (torch.float64, torch.float32))
def test_layer(shape, r, strategy, dtype):
    theirs, ours = pair(shape, r, dtype)
    ours.strategy = strategy
    x = normal(7, shape[0], seed=9, dtype=dtype).requires_grad_()
    g = normal(7, shape[1], seed=10, dtype=dtype)
    results = []
    for layer in (theirs, ours):
        y = layer(x)
        inputs = (x, layer.randlora_lambda["default"], layer.randlora_gamma["default"])
        results.append((y, *torch.autograd.grad(y, inputs, g), layer.get_delta_weight("default")))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for a, b in zip(*results, strict=True):
        scale = a.abs().max()
        torch.testing.assert_close(b / scale, a / scale, rtol=tolerance, atol=tolerance)


@over("dtype", (torch.float64, torch.float32))
def test_unique_base_grad(dtype):
    A, lam, gamma = draw_factors(5, 9, 41, dtype)
    lam.requires_grad_(), gamma.requires_grad_()
    G = normal(5, 9, 41, seed=7, dtype=dtype)
    results = []
    for function in (peft_layer.UniqueBaseGrad, randlora.UniqueBaseGrad):
        S = function.apply(A, lam, gamma)
        results.append((S, *torch.autograd.grad(S, (lam, gamma), G)))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


def test_only_ours_runs_under_torch_func():
    """Fact 18: PEFT's function has no setup_context."""
    A, lam, gamma = draw_factors(5, 9, 41)

    def loss(function):
        return torch.func.grad(lambda lam: function.apply(A, lam, gamma).sum())(lam)

    with pytest.raises(RuntimeError, match="setup_context"):
        loss(peft_layer.UniqueBaseGrad)
    torch.testing.assert_close(loss(randlora.UniqueBaseGrad), (A * gamma).sum(2), rtol=1e-4, atol=1e-4)


def test_only_ours_gives_16_bit_weights_back():
    """Fact 16."""
    theirs, ours = pair((41, 24), 5, torch.bfloat16)
    for layer, exact in ((theirs, False), (ours, True)):
        before = layer.get_base_layer().weight.detach().clone()
        layer.merge()
        layer.unmerge()
        assert torch.equal(layer.get_base_layer().weight, before) == exact
