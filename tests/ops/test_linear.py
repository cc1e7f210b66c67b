"""The layer op: three strategies, forward and backward, against the two lines of the mathematics."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.common import STRATEGIES, assert_no_worse_than_plain, normal, on_devices, over, strategies_and_dropout
from helpers.layer_op import ALL_GRADIENTS, draw_layer, gradients, mask_of, op_options, reference

import randlora
from randlora.functional import linear

SHAPES = [(41, 64, 5), (64, 41, 5), (3, 1, 4), (1, 1, 1), (33, 33, 40), (24, 41, 8)]  # in, out, r
SHAPES_OF_SOME_SIZE = [(41, 64, 5), (64, 41, 5), (33, 33, 40), (100, 341, 32)]


def shape_id(shape):
    return f"{shape[0]}to{shape[1]}r{shape[2]}"


shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


@on_devices
@shapes
@strategies_and_dropout
@pytest.mark.parametrize("workspace", [0, 1], ids=["whole", "chunked"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "nobias"])
def test_float64_parity(shape, strategy, workspace, dropout, with_bias, device):
    x, weight, bias, *factors = draw_layer(shape, device=device)
    bias = bias if with_bias else None
    seed = torch.tensor([1234], device=device)
    y = linear(x, weight, bias, *factors, 0.7, dropout, strategy=strategy, workspace=workspace, seed=seed)
    exact = reference(x, weight, bias, *factors, 0.7, mask_of(x, seed, dropout) if dropout else 1.0)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    inputs = [t for t in (x, bias, *factors[2:]) if t is not None]
    for got, expected in zip(gradients(y, inputs), gradients(exact, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@on_devices
@pytest.mark.parametrize("shape", SHAPES_OF_SOME_SIZE, ids=shape_id)  # among few numbers luck decides who rounds best
@strategies
@over("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision_is_no_worse_than_plain(shape, strategy, dtype, device):
    """fp32 lambda and gamma next to 16-bit tensors; output and all gradients by the 2x rule."""
    i, o, _ = shape
    x, weight, bias, A, B, lam, gamma = draw_layer(shape, dtype, torch.float32, device, tokens=30)
    inputs = (x, bias, lam, gamma)
    m, M, (r, n) = min(i, o), max(i, o), lam.shape
    S2 = (lam[:, :, None] * A[:, :, :m] * gamma * 0.7).reshape(r * n, m).to(dtype)
    B2 = B[:M, :n].reshape(M, n * r)
    if strategy == "factored":
        update = (x @ S2.T) @ B2.T if i <= o else (x @ B2) @ S2
        plain = F.linear(x, weight, bias) + update
    else:
        dW = B2 @ S2 if i <= o else S2.T @ B2.T
        plain = F.linear(x, weight + dW, bias) if strategy == "merged" else F.linear(x, weight, bias) + x @ dW.T
    y = linear(x, weight, bias, A, B, lam, gamma, 0.7, strategy=strategy)
    exact = reference(x, weight, bias, A, B, lam, gamma, 0.7)
    assert_no_worse_than_plain(y.detach(), plain.detach(), exact.detach())
    g = normal(*y.shape, seed=9, dtype=dtype, device=device)
    exact_gradients = torch.autograd.grad(exact, inputs, g.double())
    for got, other, true, name in zip(
        torch.autograd.grad(y, inputs, g), torch.autograd.grad(plain, inputs, g), exact_gradients,
        ("x", "bias", "lambda", "gamma"), strict=True,
    ):  # fmt: skip
        assert got.dtype == other.dtype, name
        assert_no_worse_than_plain(got, other, true.double())


@on_devices
@shapes
@strategies
def test_gradcheck(shape, strategy, device):
    x, weight, bias, A, B, lam, gamma = draw_layer(shape, device=device)

    def function(x, bias, lam, gamma):
        return linear(x, weight, bias, A, B, lam, gamma, 0.7, strategy=strategy)

    assert torch.autograd.gradcheck(function, (x, bias, lam, gamma), fast_mode=True)


@on_devices
@strategies
@over("dtype", (torch.float64, torch.float32, torch.bfloat16))
def test_opcheck(strategy, dtype, device):
    x, weight, bias, *factors = (t.detach() for t in draw_layer((24, 41, 8), dtype, device=device))
    options = op_options(dtype, strategy)
    op, backward = torch.ops.randlora.linear.default, torch.ops.randlora.linear_backward.default
    torch.library.opcheck(op, (x, weight, bias, *factors, [], None), {**options, "out_features": 41})
    grad = normal(2, 5, 41, dtype=dtype, device=device)
    torch.library.opcheck(backward, (grad, x, weight, *factors, [], None), {**options, **ALL_GRADIENTS})


@pytest.mark.parametrize("name", ["linear", "linear_backward"])
def test_tensors_have_places_and_all_else_has_names(name):
    """So that no two options of the same type can be mistaken for each other, in C++ or in Python."""
    for argument in getattr(torch.ops.randlora, name).default._schema.arguments:
        assert argument.kwarg_only == ("Tensor" not in str(argument.type)), argument.name


@on_devices
@strategies
@over("dtype", (torch.float32, torch.bfloat16))
def test_repeats_bit_for_bit(strategy, dtype, device):
    def run():
        x, weight, bias, *factors = draw_layer((64, 96, 8), dtype, torch.float32, device)
        y = linear(x, weight, bias, *factors, 0.7, strategy=strategy)
        return y, *gradients(y, (x, bias, *factors[2:]))

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=4))[1:], ids=str)
@strategies
def test_only_asked_for_gradients(needed, strategy):
    x, weight, bias, *factors = draw_layer((24, 41, 8))
    inputs = (x, bias, *factors[2:])
    everything = gradients(linear(x, weight, bias, *factors, 0.7, strategy=strategy), inputs)
    for t, need in zip(inputs, needed, strict=True):
        t.requires_grad_(need)
    y = linear(x, weight, bias, *factors, 0.7, strategy=strategy)
    y.backward(normal(*y.shape, seed=9, dtype=y.dtype))
    for t, need, expected in zip(inputs, needed, everything, strict=True):
        assert (t.grad is not None) == need
        if need:
            torch.testing.assert_close(t.grad, expected, rtol=1e-12, atol=1e-12)


@strategies
def test_backward_without_parameters_does_no_parameter_work(strategy):
    """A frozen adapter's backward neither builds the scaled base's gradient nor reduces it."""
    x, weight, bias, *factors = draw_layer((24, 41, 8))
    for t in factors[2:]:
        t.requires_grad_(False)
    y = linear(x, weight, bias, *factors, 0.7, strategy=strategy)
    with torch.profiler.profile() as profile:
        y.sum().backward()
    assert "randlora::unique_base_backward" not in {event.key for event in profile.key_averages()}


@on_devices
@shapes
def test_trainable_base_weight_takes_the_ordinary_path(shape, device):
    x, weight, bias, *factors = draw_layer(shape, device=device)
    weight.requires_grad_()
    inputs = (x, weight, bias, *factors[2:])
    y = linear(x, weight, bias, *factors, 0.7)
    exact = reference(x, weight, bias, *factors, 0.7)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    for got, expected in zip(gradients(y, inputs), gradients(exact, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for strategy in ("auto", "factored", "materialized", "merged"):
        with torch.no_grad():
            y = linear(x, weight, bias, *factors, 0.7, strategy=strategy)
        torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)


@on_devices
@shapes
@strategies
def test_conv1d_layout_and_update_alone(shape, strategy, device):
    x, weight, bias, *factors = draw_layer(shape, device=device)
    y = linear(x, weight, bias, *factors, 0.7, strategy=strategy)
    stored = weight.t().contiguous()
    transposed = linear(x, stored, bias, *factors, 0.7, strategy=strategy, weight_is_transposed=True)
    torch.testing.assert_close(transposed, y, rtol=1e-12, atol=1e-12)
    if strategy != "merged":
        alone = linear(x, None, None, *factors, 0.7, strategy=strategy, out_features=weight.shape[0])
        torch.testing.assert_close(alone + F.linear(x, weight, bias), y, rtol=1e-12, atol=1e-12)


@on_devices
@strategies
@pytest.mark.parametrize("leading", [(), (0,), (3, 0), (7,), (2, 3, 4)], ids=str)
def test_leading_shapes(leading, strategy, device):
    _, weight, bias, *factors = draw_layer((24, 41, 8), device=device)
    x = normal(*leading, 24, dtype=torch.float64, device=device).requires_grad_()
    y = linear(x, weight, bias, *factors, 0.7, strategy=strategy)
    assert y.shape == (*leading, 41)
    exact = reference(x, weight, bias, *factors, 0.7)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    inputs = (x, bias, *factors[2:])
    for got, expected in zip(gradients(y, inputs), gradients(exact, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@strategies
def test_non_contiguous_input(strategy):
    _, weight, bias, *factors = draw_layer((24, 41, 8))
    strided = normal(5, 24, 2, dtype=torch.float64).permute(2, 0, 1).requires_grad_()
    y = linear(strided, weight, bias, *factors, 0.7, strategy=strategy)
    exact = reference(strided, weight, bias, *factors, 0.7)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(*(gradients(t, strided)[0] for t in (y, exact)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_bases", [1, 2])
def test_fewer_bases_give_lower_rank(num_bases):
    x, weight, bias, A, B, lam, gamma = draw_layer((24, 41, 4), num_bases=num_bases)
    y = linear(x, weight, bias, A, B, lam, gamma, 0.7)
    torch.testing.assert_close(y, reference(x, weight, bias, A, B, lam, gamma, 0.7), rtol=1e-10, atol=1e-10)
    dW = randlora.functional.delta_weight(A, B, lam, gamma, 0.7, 24, 41)
    assert torch.linalg.matrix_rank(dW) == 4 * num_bases


@shapes
@strategies
def test_double_backward(shape, strategy):
    x, weight, bias, *factors = draw_layer(shape)
    inputs = (x, bias, *factors[2:])
    found = []
    for y in (linear(x, weight, bias, *factors, 0.7, strategy=strategy), reference(x, weight, bias, *factors, 0.7)):
        first = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(41, 23)}, ValueError, r"weight must have shape \[out, in\] with in = 24.*\[41, 23\]"),
        ({"bias": torch.zeros(40)}, ValueError, r"bias must have shape \[out\] = \[41\]"),
        ({"A": torch.zeros(8, 1, 23)}, ValueError, r"A must have shape .* = \[8, 1, >= 24\], got \[8, 1, 23\]"),
        ({"B": torch.zeros(40, 3, 8)}, ValueError, r"B must have shape .* = \[>= 41, >= 3, 8\], got \[40, 3, 8\]"),
        ({"gamma": torch.zeros(3, 25)}, ValueError, r"randlora_gamma must have shape .* \[3, 24\], got \[3, 25\]"),
        ({"weight": torch.zeros(41, 24).bfloat16()}, TypeError, "same dtype, got torch.float32 and torch.bfloat16"),
        ({"weight": None}, ValueError, "without a weight, out_features must be given"),
        ({"strategy": "fast"}, ValueError, "strategy must be factored, materialized or merged"),
        ({"strategy": "merged", "dropout": 0.1}, ValueError, "merged strategy .* takes no dropout"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1, got 1"),
        ({"workspace": -1}, ValueError, "workspace must be 0 .* got -1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_arguments(change, error, message):
    names = ("x", "weight", "bias", "A", "B", "lam", "gamma")
    given = dict(zip(names, (t.detach() for t in draw_layer((24, 41, 8), torch.float32)), strict=True))
    options = {"dropout": 0.0, "strategy": "factored", "workspace": 0} | given | change
    positional = [options.pop(name) for name in names]
    with pytest.raises(error, match=message):
        linear(*positional, 0.7, **options)
