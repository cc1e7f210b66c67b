"""The ops of Hadamard bases by themselves: schemas, the update and its gradients, threads, and what is refused."""

import itertools

import pytest
import torch
from helpers.common import FLOATS, normal, on_devices, over
from helpers.hadamard_cases import STRATEGIES, Layer, assert_close, shape_id, shapes, some_shapes
from helpers.layer_op import ALL_GRADIENTS, op_options


@on_devices
@pytest.mark.parametrize("shape", [(24, 41, 8, 0, 2), (41, 24, 8, 0, 1)], ids=shape_id)
@over("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_opcheck(shape, dtype, device):
    layer, ops = Layer(shape, dtype, device=device, tokens=(6,)), torch.ops.randlora
    for t in layer.inputs:
        t.requires_grad_(False)
    m, M = sorted(shape[:2])
    factors = layer.pattern, layer.lam, layer.gamma
    for strategy in STRATEGIES:
        options, others = op_options(dtype, strategy), (None, None, layer.lam, layer.gamma, layer.pattern, None)
        given = layer.x, layer.weight, layer.bias, *others
        torch.library.opcheck(ops.linear.default, given, {**options, "out_features": layer.o})
        grad = normal(6, layer.o, dtype=dtype, device=device)
        given = grad, layer.x, layer.weight, *others
        torch.library.opcheck(ops.linear_backward.default, given, {**options, **ALL_GRADIENTS})
    narrow, wide = (normal(6, size, dtype=dtype, device=device) for size in (m, M))
    torch.library.opcheck(ops.hadamard_up_.default, (wide.clone(), narrow, *factors, 0.7))
    torch.library.opcheck(ops.hadamard_down_.default, (narrow.clone(), wide, *factors, 0.7))
    for into in ((None, None), (narrow.clone(), None), (None, wide.clone())):
        torch.library.opcheck(ops.hadamard_gradients.default, (narrow, wide, *into, *factors, 0.7))
    weight = normal(m, M, dtype=dtype, device=device)
    for given in (None, weight, weight.t().contiguous().t()):
        torch.library.opcheck(ops.hadamard_update.default, (*factors, M, 0.7, given, dtype))
    grad = normal(m, M, dtype=torch.promote_types(dtype, torch.float32), device=device)
    for needs in itertools.product((False, True), repeat=2):
        torch.library.opcheck(ops.hadamard_update_backward.default, (grad, *factors, 0.7, *needs))


@on_devices
@some_shapes
@over("dtype", FLOATS)
def test_update(shape, dtype, device):
    """The matrix itself, alone and added to a weight in either layout, whose layout the sum has."""
    layer = Layer(shape, dtype, torch.promote_types(dtype, torch.float32), device)
    m, M = sorted(shape[:2])
    D = (layer.dW().T if layer.i <= layer.o else layer.dW()).detach()
    update = torch.ops.randlora.hadamard_update
    factors = layer.pattern, layer.lam.detach(), layer.gamma.detach(), M, 0.7
    size = D.abs().max().item()
    alone, rounding = update(*factors, None, dtype), max(torch.finfo(dtype).eps, 1e-15) * 2 * size
    torch.testing.assert_close(alone.double(), D, rtol=0, atol=rounding)
    for rows in (normal(m, M, dtype=dtype, device=device), normal(M, m, dtype=dtype, device=device).t()):
        both = update(*factors, rows, dtype)
        assert both.stride() == rows.stride() and both.dtype == dtype
        torch.testing.assert_close(both.double(), rows.double() + D, rtol=0, atol=rounding)


@on_devices
@shapes
@over("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_gradients_of_the_update(shape, needs, dtype, device):
    layer = Layer(shape, dtype, device=device)
    m, M = sorted(shape[:2])
    lam, gamma = (t.detach().double().requires_grad_() for t in (layer.lam, layer.gamma))
    dW = layer.dW(lam, gamma)
    grad = normal(M, m, seed=8, dtype=dtype, device=device).t()
    expected = torch.autograd.grad(dW.T if layer.i <= layer.o else dW, (lam, gamma), grad.double())
    got = torch.ops.randlora.hadamard_update_backward(grad, layer.pattern, layer.lam, layer.gamma, 0.7, *needs)
    for result, true, need in zip(got, expected, needs, strict=True):
        assert result.dtype == dtype and result.shape == (true.shape if need else (0,))
        if need:
            assert_close(result.double(), true, 1e-10 if dtype == torch.float64 else 2e-5)


@on_devices
@pytest.mark.parametrize("shape", [(37, 90, 5, 0, 2), (90, 37, 5, 0, 2), (384, 384, 32, 0, 8)], ids=shape_id)
@pytest.mark.parametrize("tokens", [4, 200])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_bad_token_stays_alone(value, tokens, shape, device):
    """Room that tokens share holds nothing of the one before."""

    def run(value):
        layer = Layer(shape, torch.float32, device=device, tokens=(tokens,))
        with torch.no_grad():
            layer.x[1] = value
        g = normal(tokens, layer.o, seed=9, device=device)
        g[2] = value
        y = layer("factored")
        dx = torch.autograd.grad(y, layer.x, g)[0]
        return torch.cat((y[:1], y[2:])), torch.cat((dx[:2], dx[3:]))

    for good, beside_bad in zip(run(0.5), run(value), strict=True):
        assert torch.equal(good, beside_bad)


@over("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", [(384, 640, 32, 0, 8), (640, 384, 12, 0, 8)], ids=shape_id)
@pytest.mark.parametrize("tokens", [1, 16, 200])
def test_the_number_of_threads_changes_nothing(tokens, shape, dtype):
    layer = Layer(shape, dtype, torch.float32, tokens=(tokens,))
    m, M = sorted(shape[:2])
    narrow, wide = (normal(tokens, size, dtype=dtype) for size in (m, M))
    factors = layer.pattern, layer.lam.detach(), layer.gamma.detach()

    def run():
        up, down = torch.zeros_like(wide), torch.zeros_like(narrow)
        torch.ops.randlora.hadamard_up_(up, narrow, *factors, 0.7)
        torch.ops.randlora.hadamard_down_(down, wide, *factors, 0.7)
        again = torch.zeros_like(narrow)
        gradients = torch.ops.randlora.hadamard_gradients(narrow, wide, again, None, *factors, 0.7)
        update = torch.ops.randlora.hadamard_update(*factors, M, 0.7, None, dtype)
        return up, down, again, *gradients, update

    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("place", "tensor", "error", "message"),
    [
        (0, torch.zeros(2, dtype=torch.int64), TypeError, "words of signs must be int32, got Long at 0"),
        (1, torch.zeros(1, 2, dtype=torch.int32), ValueError, r"contiguous vectors on cpu, got shape \[1, 2\].* at 1"),
        (2, torch.zeros(4, dtype=torch.int32)[::2], ValueError, "contiguous vectors on cpu"),
        (0, torch.zeros(0, dtype=torch.int32), ValueError, "a must have at least 1 words .* 24 signs, got 0"),
        (1, torch.zeros(1, dtype=torch.int32), ValueError, "b must have at least 2 words .* 41 signs, got 1"),
        (2, torch.zeros(0, dtype=torch.int32), ValueError, "c must have at least 1 words .* 24 signs, got 0"),
        (3, torch.zeros(3, 0, dtype=torch.int8), ValueError, r"width must have shape \[w, 0\] .* got \[3, 0\]"),
        (3, torch.zeros(8, 1, dtype=torch.int8), ValueError, r"width must have shape \[w, 0\] .* got \[8, 1\]"),
        (3, torch.zeros(8, dtype=torch.int8), ValueError, r"width must have shape \[w, 0\] .* got \[8\]"),
        (3, torch.zeros(8, 0, dtype=torch.int32), TypeError, "width must be int8, got Int"),
    ],
)
def test_bad_patterns(place, tensor, error, message):
    layer = Layer((24, 41, 8, 0, 1), torch.float32)
    layer.pattern[place] = tensor
    for strategy in STRATEGIES:
        with pytest.raises(error, match=message):
            layer(strategy)
    with pytest.raises(error, match=message):
        y = torch.zeros(10, 41)
        torch.ops.randlora.hadamard_up_(y, layer.x.detach().flatten(0, 1), layer.pattern, layer.lam, layer.gamma, 0.7)


def test_patterns_are_checked_by_themselves():
    pattern = Layer((24, 41, 8, 0, 1)).pattern
    torch.ops.randlora.check_pattern(pattern)
    pattern[3] = torch.empty(5, 0, dtype=torch.int8)
    with pytest.raises(ValueError, match="width must have shape"):
        torch.ops.randlora.check_pattern(pattern)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wide": torch.zeros(6, 40)}, ValueError, "b must|max_dim|wide side"),
        ({"wide": torch.zeros(5, 41)}, ValueError, r"wide side must be contiguous with shape \[6, 41\]"),
        ({"wide": torch.zeros(6, 41).double()}, TypeError, "wide side must have dtype Float, got Double"),
        ({"narrow": torch.zeros(24, 6).t()}, ValueError, r"narrow side must be contiguous with shape \[6, 24\]"),
        ({"narrow": torch.zeros(6, 24).int()}, TypeError, "tokens must be float64, float32, bfloat16 or float16"),
        ({"into_wide": torch.zeros(6, 24)}, ValueError, r"into_wide must be contiguous with shape \[6, 41\]"),
        ({"into_wide": torch.zeros(6, 41), "into_narrow": torch.zeros(6, 24)}, ValueError, "at most one"),
        ({"lam": torch.zeros(8, 4)}, ValueError, r"randlora_gamma must have shape \[n, m\] with n = 4"),
        ({"gamma": torch.zeros(3, 42)}, ValueError, "at most max_dim = 41 columns"),
    ],
)  # fmt: skip
def test_bad_tokens(change, error, message):
    layer = Layer((24, 41, 8, 0, 1), torch.float32)
    given = {"narrow": torch.zeros(6, 24), "wide": torch.zeros(6, 41), "into_narrow": None, "into_wide": None,
             "lam": layer.lam.detach(), "gamma": layer.gamma.detach()} | change  # fmt: skip
    tokens = [given[name] for name in ("narrow", "wide", "into_narrow", "into_wide")]
    if "wide" in change and change["wide"].shape == (6, 40):
        layer.pattern[1] = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(error, match=message):
        torch.ops.randlora.hadamard_gradients(*tokens, layer.pattern, given["lam"], given["gamma"], 0.7)
