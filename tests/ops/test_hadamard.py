"""Hadamard bases in the layer op: the update by fast transforms against A and B written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.common import assert_no_worse_than_plain, normal, on_devices, over, strategies_and_dropout
from helpers.hadamard_cases import Layer, assert_close, gradients, shape_id, shapes, some_shapes, strategies


@on_devices
@shapes
@strategies_and_dropout
def test_float64_parity(shape, strategy, dropout, device):
    layer = Layer(shape, device=device)
    seed = torch.tensor([1234], device=device)
    y = layer(strategy, dropout=dropout, seed=seed)
    mask = torch.ops.randlora.dropout(torch.ones_like(layer.x), seed, dropout) if dropout else 1.0
    exact = layer.exact(mask)
    assert_close(y, exact)
    for got, expected in zip(gradients(y, layer.inputs), gradients(exact, layer.inputs), strict=True):
        assert_close(got, expected)


@on_devices
@some_shapes
@strategies
@over("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision_is_no_worse_than_plain(shape, strategy, dtype, device):
    """fp32 lambda and gamma next to 16-bit tensors; output and all gradients by the 2x rule."""
    layer = Layer(shape, dtype, torch.float32, device, tokens=(2, 30))
    i, o, r, _, _ = shape
    n, m = layer.gamma.shape
    S2 = (layer.lam[:, :, None] * layer.A * layer.gamma * 0.7).reshape(r * n, m).to(dtype)
    B2 = layer.B.reshape(max(i, o), n * r)
    x, weight, bias = layer.x, layer.weight, layer.bias
    if strategy == "factored":
        plain = F.linear(x, weight, bias) + ((x @ S2.T) @ B2.T if i <= o else (x @ B2) @ S2)
    else:
        dW = B2 @ S2 if i <= o else S2.T @ B2.T
        plain = F.linear(x, weight + dW, bias) if strategy == "merged" else F.linear(x, weight, bias) + x @ dW.T
    y, exact = layer(strategy), layer.exact()
    assert_no_worse_than_plain(y.detach(), plain.detach(), exact.detach())
    g = normal(*y.shape, seed=9, dtype=dtype, device=device)
    found = (torch.autograd.grad(result, layer.inputs, g.to(result.dtype)) for result in (y, plain, exact))
    for got, other, true, name in zip(*found, ("x", "bias", "lambda", "gamma"), strict=True):
        assert got.dtype == other.dtype, name
        assert_no_worse_than_plain(got, other, true.double())


@on_devices
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 8, 9, 15, 16, 17, 33, 64, 131, 700])
@pytest.mark.parametrize("shape", [(41, 96, 12, 0, 2), (96, 41, 12, 0, 1), (384, 384, 32, 0, 8)], ids=shape_id)
@over("dtype", (torch.float64, torch.float32))
def test_every_number_of_tokens(tokens, shape, dtype, device):
    layer = Layer(shape, dtype, device=device, tokens=(tokens,))
    y, exact = layer("factored"), layer.exact()
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert_close(y.double(), exact, tolerance)
    g = normal(*y.shape, seed=9, dtype=dtype, device=device)
    found = (torch.autograd.grad(result, layer.inputs, g.to(result.dtype)) for result in (y, exact))
    for got, expected in zip(*found, strict=True):
        assert_close(got.double(), expected.double(), tolerance)


@on_devices
@pytest.mark.parametrize("shape", [(24, 41, 5, 0, 2), (41, 24, 5, 0, 1), (20, 20, 4, 0, 4)], ids=shape_id)
@strategies
def test_gradcheck(shape, strategy, device):
    layer = Layer(shape, device=device)

    def function(x, bias, lam, gamma):
        layer.x, layer.bias, layer.lam, layer.gamma = x, bias, lam, gamma
        return layer(strategy)

    assert torch.autograd.gradcheck(function, layer.inputs, fast_mode=True)


@pytest.mark.parametrize("strategy", ["materialized", "merged"])
def test_the_cpu_takes_gradients_from_the_tokens(strategy):
    """They cost less than the gradient of dW alone, whatever the strategy."""
    layer = Layer((24, 41, 8, 0, 1))
    y = layer(strategy)
    with torch.profiler.profile() as profile:
        y.sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert "randlora::hadamard_gradients" in names and "randlora::hadamard_update_backward" not in names


@on_devices
@strategies
@over("dtype", (torch.float32, torch.bfloat16))
def test_repeats_bit_for_bit(strategy, dtype, device):
    def run():
        layer = Layer((384, 640, 32, 0, 8), dtype, torch.float32, device, tokens=(200,))
        y = layer(strategy)
        return y, *gradients(y, layer.inputs)

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:], ids=str)
@strategies
@pytest.mark.parametrize("shape", [(24, 41, 8, 0, 1), (41, 24, 8, 0, 1)], ids=shape_id)
def test_only_asked_for_gradients(needed, strategy, shape):
    layer = Layer(shape)
    everything = gradients(layer(strategy), layer.inputs)
    for t, need in zip(layer.inputs, needed, strict=True):
        t.requires_grad_(need)
    y = layer(strategy)
    y.backward(normal(*y.shape, seed=9, dtype=y.dtype))
    for t, need, expected in zip(layer.inputs, needed, everything, strict=True):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad, expected, rtol=1e-12, atol=1e-12)


@on_devices
@pytest.mark.parametrize("shape", [(41, 96, 12, 0, 2), (96, 41, 12, 0, 1)], ids=shape_id)
@strategies
def test_conv1d_layout_and_update_alone(shape, strategy, device):
    layer = Layer(shape, device=device)
    y = layer(strategy)
    assert_close(layer(strategy, weight=layer.weight.t().contiguous(), weight_is_transposed=True), y)
    if strategy != "merged":
        alone = layer(strategy, weight=None, bias=None, out_features=layer.o)
        assert_close(alone + F.linear(layer.x, layer.weight, layer.bias), y)
        for got, expected in zip(
            gradients(alone, (layer.x, layer.lam, layer.gamma)),
            gradients(layer.x @ layer.dW().T, (layer.x, layer.lam, layer.gamma)),
            strict=True,
        ):
            assert_close(got, expected)


@on_devices
@pytest.mark.parametrize("shape", [(24, 41, 8, 0, 1), (41, 24, 8, 0, 1)], ids=shape_id)
@strategies
def test_strides(shape, strategy, device):
    """Inputs, gradients and parameters that are not contiguous, expanded ones too."""
    layer = Layer(shape, device=device)
    i, o = shape[:2]
    x = normal(1, i, 5, dtype=torch.float64, device=device).expand(2, i, 5).transpose(1, 2).requires_grad_()
    layer.x = x
    layer.lam = layer.lam.detach().t().contiguous().t().requires_grad_()
    layer.gamma = layer.gamma.detach().t().contiguous().t().requires_grad_()
    y, exact = layer(strategy), layer.exact()
    assert_close(y, exact)
    g = normal(o, dtype=torch.float64, device=device).expand(2, 5, o)
    for got, expected in zip(*(torch.autograd.grad(t, layer.inputs, g) for t in (y, exact)), strict=True):
        assert_close(got, expected)


@pytest.mark.parametrize("shape", [(24, 41, 8, 0, 1), (41, 24, 8, 0, 1)], ids=shape_id)
@strategies
def test_double_backward(shape, strategy):
    layer = Layer(shape)
    found = []
    for y in (layer(strategy), layer.exact()):
        first = torch.autograd.grad(y.pow(3).sum() * 1e-6, layer.inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), layer.inputs))
    for got, expected in zip(*found, strict=True):
        assert_close(got, expected, 1e-9)
