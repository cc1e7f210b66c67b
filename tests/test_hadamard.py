"""Hadamard bases in the layer op: the update by fast transforms against A and B written out."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from common import FLOATS, assert_no_worse_than_plain, normal, on_devices, over, reference_dW

from randlora.functional import linear

STRATEGIES = ("factored", "materialized", "merged")
# in, out, r, n (0: as many as rank needs), width
SHAPES = [
    (1, 1, 1, 0, 1), (3, 1, 4, 0, 2), (1, 41, 1, 0, 8), (3, 41, 4, 0, 1), (41, 96, 1, 0, 8), (41, 96, 12, 0, 2),
    (96, 41, 12, 0, 1), (96, 96, 32, 0, 1), (96, 341, 33, 0, 1), (341, 96, 33, 2, 1), (341, 341, 32, 0, 8),
    (384, 640, 12, 0, 8), (640, 384, 32, 0, 8), (384, 384, 32, 0, 8), (1000, 41, 128, 0, 1), (341, 1000, 128, 0, 2),
    (640, 341, 32, 3, 4), (96, 341, 4, 70, 8), (1000, 1000, 32, 0, 4),
]  # fmt: skip
SOME = [(341, 341, 32, 0, 8), (384, 640, 12, 0, 8), (640, 384, 32, 0, 8), (341, 96, 33, 2, 1)]


def shape_id(shape):
    return "{}to{}r{}n{}w{}".format(*shape)


shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
some_shapes = pytest.mark.parametrize("shape", SOME, ids=shape_id)
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def words(signs):
    """int32 words of a vector of signs, and one word more."""
    bits = F.pad((signs < 0).long(), (0, 32 + -len(signs) % 32)).view(-1, 32)
    return (bits << torch.arange(32)).sum(1).to(torch.int32)


def walsh(x, y):
    """(-1)^popcount(x & y) for all x below `x` and y below `y`."""
    z = torch.arange(x)[:, None] & torch.arange(y)
    parity = torch.zeros_like(z)
    while z.any():
        parity, z = parity ^ (z & 1), z >> 1
    return 1.0 - 2.0 * parity.double()


class Layer:
    """Everything of a layer, drawn at random, with bases as the op takes them and written out."""

    def __init__(self, shape, dtype=torch.float64, parameter_dtype=None, device="cpu", tokens=(2, 5)):
        self.i, self.o, r, n, width = shape
        m, M = min(self.i, self.o), max(self.i, self.o)
        n = n or -(-m // r)
        a, b, c = (normal(size, seed=seed, dtype=torch.float64).sign() for seed, size in enumerate((m, M, n * r)))
        self.pattern = [t.to(device) for t in (*map(words, (a, b, c)), torch.empty(width, 0, dtype=torch.int8))]
        R = 1 << (r - 1).bit_length()
        A = walsh(r, R)[:, torch.arange(m) // width % R] * a
        B = (walsh(M, n * r) * b[:, None] * c).view(M, n, r)
        self.A, self.B = A[:, None].to(device, dtype), B.to(device, dtype)
        parameter_dtype = parameter_dtype or dtype
        self.lam = normal(r, n, seed=3, dtype=parameter_dtype, device=device)
        self.gamma = normal(n, m, seed=4, dtype=parameter_dtype, device=device)
        self.x = normal(*tokens, self.i, seed=5, dtype=dtype, device=device)
        self.weight = normal(self.o, self.i, seed=6, dtype=dtype, device=device)
        self.bias = normal(self.o, seed=7, dtype=dtype, device=device)
        for t in self.inputs:
            t.requires_grad_()

    @property
    def inputs(self):
        return self.x, self.bias, self.lam, self.gamma

    def __call__(self, strategy, **options):
        given = {"x": self.x, "weight": self.weight, "bias": self.bias} | options
        parameters = self.lam, self.gamma
        return linear(*(given.pop(name) for name in ("x", "weight", "bias")), None, None, *parameters, 0.7,
                      strategy=strategy, pattern=self.pattern, **given)  # fmt: skip

    def dW(self, lam=None, gamma=None):
        lam, gamma = self.lam if lam is None else lam, self.gamma if gamma is None else gamma
        return reference_dW(self.A, self.B, lam, gamma, 0.7, self.i, self.o)

    def exact(self, mask=1.0):
        x, weight, bias = (t.double() for t in (self.x, self.weight, self.bias))
        return F.linear(x, weight, bias) + (x * mask) @ self.dW().T


def gradients(y, inputs, seed=9):
    return torch.autograd.grad(y, inputs, normal(*y.shape, seed=seed, dtype=y.dtype, device=y.device))


def assert_close(got, expected, tolerance=1e-10):
    size = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * size)


@on_devices
@shapes
@strategies
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_float64_parity(shape, strategy, dropout, device):
    if strategy == "merged" and dropout:
        pytest.skip("merged takes no dropout")
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
        options = (0.7, dtype, strategy, 0.0, None, False, 0, layer.pattern)
        given = layer.weight, layer.bias, None, None, layer.lam, layer.gamma
        torch.library.opcheck(ops.linear.default, (layer.x, *given, layer.o, *options))
        grad = normal(6, layer.o, dtype=dtype, device=device)
        given = layer.weight, None, None, layer.lam, layer.gamma
        torch.library.opcheck(ops.linear_backward.default, (grad, layer.x, *given, *options, True, True, True))
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
@pytest.mark.parametrize("shape", [(37, 90, 5, 0, 2), (90, 37, 5, 0, 2), (384, 384, 32, 0, 8)], ids=shape_id)
@pytest.mark.parametrize("tokens", [4, 30])
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
