"""UniqueBaseGrad: values, gradients, strides, errors, and what it costs in memory."""

import pytest
import torch
from helpers.common import (
    FLOATS,
    HALVES,
    assert_no_worse_than_plain,
    assert_rounding_only,
    draw_factors,
    normal,
    on_devices,
    over,
    reference_S,
)  # fmt: skip
from torch.func import grad, jacrev, vmap

import randlora
from randlora.functional import unique_base

_ops = torch.ops.randlora
SIZES = [  # r, n, m
    (1, 1, 1), (3, 1, 3), (5, 9, 41), (40, 1, 33), (32, 11, 341), (4, 3, 1000), (1, 41, 41),
    (32, 2, 1023), (31, 2, 1024), (33, 2, 1025), (4, 15, 40), (4, 16, 40), (4, 17, 40), (2, 2, 2049),
]  # fmt: skip
sizes = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


def reference_gradients(G, A, lam, gamma, scale=1.0):
    G, A, lam, gamma = (t.double() for t in (G, A[:, 0], lam, gamma))
    return scale * torch.einsum("kij,kj,ij->ki", G, A, gamma), scale * torch.einsum("kij,kj,ki->ij", G, A, lam)


def magnitudes(G, A, lam, gamma, scale=1.0):
    return reference_gradients(*(t.abs() for t in (G, A, lam, gamma)), abs(scale))


@on_devices
@sizes
@over("dtype", FLOATS)
@pytest.mark.parametrize("parameters", ["same", "fp32"])
def test_values_and_gradients(size, dtype, parameters, device):
    """Within what one rounding of the result and an fp32 (fp64) sum explain, element by element."""
    parameter_dtype = torch.float32 if parameters == "fp32" and dtype in HALVES else dtype
    A, lam, gamma = draw_factors(*size, dtype, parameter_dtype, device)
    S = unique_base(A, lam, gamma, 0.7, dtype)
    exact = reference_S(A, lam, gamma, 0.7)
    assert_rounding_only(S, exact, exact.abs(), 1)
    G = normal(*size, seed=7, dtype=dtype, device=device)
    dlam, dgamma = _ops.unique_base_backward(G, A, lam, gamma, 0.7)
    assert dlam.dtype == lam.dtype and dgamma.dtype == gamma.dtype
    r, _, m = size
    for got, true, magnitude, terms in zip(
        (dlam, dgamma), reference_gradients(G, A, lam, gamma, 0.7), magnitudes(G, A, lam, gamma, 0.7), (m, r),
        strict=True,
    ):  # fmt: skip
        assert_rounding_only(got, true, magnitude, terms)


@on_devices
@over("dtype", HALVES)
def test_no_worse_than_plain_in_16_bits(dtype, device):
    A, lam, gamma = draw_factors(32, 11, 341, dtype, device=device)
    lam.requires_grad_(), gamma.requires_grad_()
    G = normal(32, 11, 341, seed=7, dtype=dtype, device=device)
    plain = lam[:, :, None] * A * gamma
    S = unique_base(A, lam, gamma)
    assert_no_worse_than_plain(S.detach(), plain.detach(), reference_S(A, lam, gamma).detach())
    got, other = (torch.autograd.grad(t, (lam, gamma), G) for t in (S, plain))
    for a, b, true in zip(got, other, reference_gradients(G, A, lam.detach(), gamma.detach()), strict=True):
        assert_no_worse_than_plain(a, b, true)


@on_devices
def test_forward_has_the_bits_of_the_plain_expression(device):
    A, lam, gamma = draw_factors(5, 9, 341, device=device)
    assert torch.equal(unique_base(A, lam, gamma), (lam[:, :, None] * A) * gamma)


@on_devices
@over("dtype", (*FLOATS, None))
def test_result_dtype(dtype, device):
    A, lam, gamma = draw_factors(5, 9, 41, torch.bfloat16, torch.float32, device)
    S = unique_base(A, lam, gamma, dtype=dtype)
    assert S.dtype == (dtype or torch.float32)
    assert unique_base(A, lam.bfloat16(), gamma.bfloat16()).dtype == torch.bfloat16
    assert unique_base(A, lam.half(), gamma.half()).dtype == torch.float32  # as PyTorch promotes bf16 with fp16
    assert_rounding_only(S, reference_S(A, lam, gamma), reference_S(A, lam, gamma).abs(), 1)


@on_devices
@over("dtype", (torch.float32, torch.bfloat16))
def test_strided_inputs(dtype, device):
    A, lam, gamma = draw_factors(8, 9, 41, dtype, torch.float32, device)
    G = normal(8, 9, 41, seed=7, dtype=dtype, device=device)
    expected = (unique_base(A, lam, gamma, dtype=dtype), *_ops.unique_base_backward(G, A, lam, gamma))
    wide = torch.cat([A, A], dim=2)
    As = {
        "slice": wide[:, :, :41],
        "every other column": torch.stack([A, A], dim=3).flatten(2)[:, :, ::2],
        "transposed": A.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    }
    for name, a in As.items():
        got = (unique_base(a, lam, gamma, dtype=dtype), *_ops.unique_base_backward(G, a, lam, gamma))
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True)), name
    Gs = {
        "slice": torch.cat([G, G], dim=1)[:, :9],
        "transposed": G.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        "columns first": G.transpose(0, 1).contiguous().transpose(0, 1),
    }
    lam_t, gamma_t = lam.t().contiguous().t(), gamma.t().contiguous().t()
    for name, g in Gs.items():
        got = _ops.unique_base_backward(g, A, lam_t, gamma_t)
        assert all(torch.equal(x, y) for x, y in zip(got, expected[1:], strict=True)), name
    one = torch.ones((), dtype=dtype, device=device).expand(8, 9, 41)
    for a, b in zip(_ops.unique_base_backward(one, A, lam, gamma),
                    _ops.unique_base_backward(one.contiguous(), A, lam, gamma), strict=True):  # fmt: skip
        assert torch.equal(a, b)


@on_devices
@over("dtype", (torch.float32, torch.bfloat16))
def test_repeats_bit_for_bit_on_any_number_of_threads(dtype, device):
    A, lam, gamma = draw_factors(33, 17, 2049, dtype, torch.float32, device)
    G = normal(33, 17, 2049, seed=7, dtype=dtype, device=device)

    def run():
        return unique_base(A, lam, gamma, dtype=dtype), *_ops.unique_base_backward(G, A, lam, gamma)

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@sizes
def test_gradcheck(size):
    if size[0] * size[1] * size[2] > 3000:
        size = tuple(min(s, 11) for s in size)
    A, lam, gamma = draw_factors(*size, torch.float64)
    lam.requires_grad_(), gamma.requires_grad_()
    for function in (randlora.UniqueBaseGrad.apply, lambda *a: unique_base(*a, scale=0.7), _ops.unique_base):
        assert torch.autograd.gradcheck(function, (A, lam, gamma), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (A, lam, gamma), fast_mode=True)


@on_devices
@over("dtype", FLOATS)
def test_opcheck(dtype, device):
    A, lam, gamma = draw_factors(5, 9, 41, dtype, device=device)
    lam.requires_grad_(), gamma.requires_grad_()
    G = normal(5, 9, 41, seed=7, dtype=dtype, device=device).requires_grad_()
    torch.library.opcheck(_ops.unique_base.default, (A, lam, gamma, 0.7, torch.float32))
    torch.library.opcheck(_ops.unique_base_backward.default, (G, A, lam, gamma, 0.7, True, True))
    torch.library.opcheck(_ops.fill_bases_.default, (torch.empty(3, 1, 9, dtype=dtype, device=device), 3, 0, [0, 0, 0]))
    torch.library.opcheck(_ops.dropout.default, (G.detach(), torch.tensor([3], device=device), 0.5))


def test_only_needed_gradients():
    A, lam, gamma = draw_factors(5, 9, 41)
    G = normal(5, 9, 41, seed=7)
    both = _ops.unique_base_backward(G, A, lam, gamma)
    only_lam, none = _ops.unique_base_backward(G, A, lam, gamma, 1.0, True, False)
    assert torch.equal(only_lam, both[0]) and none.numel() == 0
    none, only_gamma = _ops.unique_base_backward(G, A, lam, gamma, 1.0, False, True)
    assert torch.equal(only_gamma, both[1]) and none.numel() == 0
    lam.requires_grad_()
    unique_base(A, lam, gamma).backward(G)
    assert torch.equal(lam.grad, both[0]) and gamma.grad is None and A.grad is None


@on_devices
def test_backward_allocates_nothing_of_the_gradients_size(device):
    A, lam, gamma = draw_factors(32, 64, 2048, device=device)
    G = torch.ones(32, 64, 2048, device=device)
    activities = list(torch.profiler.supported_activities())
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        _ops.unique_base_backward(G, A, lam, gamma)
    events = profile.key_averages()
    allocated = sum(max(e.self_cpu_memory_usage if device == "cpu" else e.self_device_memory_usage, 0) for e in events)
    assert 0 < allocated < G.nbytes / 8


@on_devices
def test_torch_func(device):
    A, lam, gamma = draw_factors(5, 9, 41, torch.float64, device=device)
    X = normal(6, 5, 9, 41, seed=8, dtype=torch.float64, device=device)

    def plain(lam, gamma):
        return lam[:, :, None] * A * gamma

    def ours(lam, gamma):
        return randlora.UniqueBaseGrad.apply(A, lam, gamma)

    def per_sample(function):
        loss = lambda lam, gamma, x: (function(lam, gamma) * x).pow(2).sum()  # noqa: E731
        return vmap(grad(loss, (0, 1)), (None, None, 0))(lam, gamma, X)

    def ensemble(function):
        return vmap(function, (0, None))(torch.stack([lam, 2 * lam]), gamma)

    def jacobian(function):
        return jacrev(lambda lam: function(lam, gamma).sum((1, 2)))(lam)

    def second(function):
        return grad(lambda lam: grad(lambda lam: function(lam, gamma).pow(3).sum())(lam).sum())(lam)

    for transform in (per_sample, ensemble, jacobian, second):
        torch.testing.assert_close(transform(ours), transform(plain), rtol=1e-10, atol=1e-10)


@on_devices
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, device):
    torch._dynamo.reset()
    for function in (randlora.UniqueBaseGrad.apply, unique_base):
        compiled = torch.compile(function, fullgraph=True, dynamic=dynamic)
        for size in ((5, 9, 41), (5, 9, 64)):
            A, lam, gamma = draw_factors(*size, device=device)
            lam.requires_grad_(), gamma.requires_grad_()
            S = compiled(A, lam, gamma)
            assert torch.equal(S, unique_base(A, lam, gamma))
            G = normal(*size, seed=7, device=device)
            got = torch.autograd.grad(S, (lam, gamma), G)
            assert all(torch.equal(a, b) for a, b in zip(got, _ops.unique_base_backward(G, A, lam, gamma), strict=True))


@on_devices
def test_autocast_leaves_it_alone(device):
    A, lam, gamma = draw_factors(5, 9, 41, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(unique_base(A, lam, gamma), (lam[:, :, None] * A) * gamma)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"A": torch.ones(5, 41)}, ValueError, r"A must have shape \[r, 1, m\], got \[5, 41\]"),
        ({"A": torch.ones(5, 2, 41)}, ValueError, r"A must have shape \[r, 1, m\], got \[5, 2, 41\]"),
        ({"A": torch.ones(5, 1, 41, dtype=torch.int32)}, TypeError, "A must be float64, .* got Int"),
        ({"A": torch.ones(0, 1, 41)}, ValueError, r"A must not be empty, got shape \[0, 1, 41\]"),
        ({"lam": torch.ones(6, 9)}, ValueError, r"randlora_lambda must have shape \[r, n\] with r = 5.* got \[6, 9\]"),
        ({"lam": torch.ones(9)}, ValueError, r"randlora_lambda must have shape \[r, n\], got \[9\]"),
        ({"gamma": torch.ones(9, 40)}, ValueError, r"\[n, m\] = \[9, 41\].* got \[9, 40\]"),
        ({"gamma": torch.ones(8, 41)}, ValueError, r"\[n, m\] = \[9, 41\].* got \[8, 41\]"),
        ({"gamma": torch.ones(9, 41, dtype=torch.complex64)}, TypeError, "randlora_gamma must be float64"),
        ({"dtype": torch.int32}, TypeError, "dtype must be float64, .* got Int"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)  # fmt: skip
def test_bad_arguments(change, error, message):
    given = dict(zip(("A", "lam", "gamma"), draw_factors(5, 9, 41), strict=True)) | {"dtype": None} | change
    with pytest.raises(error, match=message):
        unique_base(given["A"], given["lam"], given["gamma"], dtype=given["dtype"])


def test_bad_gradient():
    A, lam, gamma = draw_factors(5, 9, 41)
    with pytest.raises(ValueError, match=r"grad must have shape \[r, n, m\] = \[5, 9, 41\], got \[5, 9, 40\]"):
        _ops.unique_base_backward(torch.ones(5, 9, 40), A, lam, gamma)


@pytest.mark.cuda
def test_devices_must_agree():
    A, lam, gamma = draw_factors(5, 9, 41)
    with pytest.raises(ValueError, match="randlora_gamma must be on the device of A, cpu, got cuda"):
        unique_base(A, lam, gamma.cuda())
