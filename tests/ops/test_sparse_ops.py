"""The ops that multiply tokens with the update of lists: schemas, numbers against the dense matrix, what is refused."""

import pytest
import torch
from helpers.common import FLOATS, normal, over, reference_dW
from helpers.layer_op import ALL_GRADIENTS, op_options
from helpers.ternary import draw

SHAPES = [(24, 41, 5), (41, 24, 5), (33, 33, 40), (1, 3, 2), (100, 341, 32)]  # in, out, r
ops = torch.ops.randlora
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}r{s[2]}")


class Case:
    """Tokens of both sides of a layer, its bases and parameters, and D [m, M] in float64."""

    def __init__(self, shape, dtype=torch.float64, tokens=7):
        (i, o, _), (m, M) = shape, sorted(shape[:2])
        _, _, _, lam, gamma, bases = draw(shape, "lists", dtype)
        pattern, scale = bases.pattern(m)
        self.lam, self.gamma = (t.detach() for t in (lam, gamma))
        self.narrow, self.wide, self.into_narrow, self.into_wide = (
            normal(tokens, size, seed=seed, dtype=dtype) for seed, size in enumerate((m, M, m, M), 11)
        )
        self.factors = list(pattern), self.lam, self.gamma, 0.7 * scale
        A, B = bases.draw(torch.float64, torch.device("cpu"))
        self.exact = [t.double().requires_grad_() for t in (self.lam, self.gamma)]
        dW = reference_dW(A, B, *self.exact, 0.7 * scale, i, o)
        self.D = dW.T if i <= o else dW

    def close(self, got, expected, dtype):
        eps = 1e-11 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=eps * max(1.0, expected.abs().max().item()))


@shapes
@over("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 70])
def test_up_and_down(tokens, shape, dtype):
    c = Case(shape, dtype, tokens)
    D = c.D.detach()
    up, down = c.into_wide.clone(), c.into_narrow.clone()
    ops.sparse_up_(up, c.narrow, *c.factors)
    ops.sparse_down_(down, c.wide, *c.factors)
    if tokens:
        c.close(up, c.into_wide.double() + c.narrow.double() @ D, dtype)
        c.close(down, c.into_narrow.double() + c.wide.double() @ D.T, dtype)


@shapes
@over("dtype", (torch.float64, torch.float32))
@pytest.mark.parametrize("tokens", [0, 1, 7, 70])
@pytest.mark.parametrize("into", [True, False])
def test_gradients(into, tokens, shape, dtype):
    c = Case(shape, dtype, tokens)
    loss = (c.wide.double() * (c.narrow.double() @ c.D)).sum()
    expected = torch.autograd.grad(loss, c.exact)
    down = c.into_narrow.clone() if into else None
    got = ops.sparse_gradients(c.narrow, c.wide, down, *c.factors)
    for result, true in zip(got, expected, strict=True):
        assert result.dtype == dtype
        assert (result.double() - true).norm() <= (1e-11 if dtype == torch.float64 else 1e-5) * (1 + true.norm())
    if into and tokens:
        c.close(down, c.into_narrow.double() + c.wide.double() @ c.D.detach().T, dtype)


@over("dtype", (torch.float64, torch.float32, torch.bfloat16))
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_opcheck(shape, dtype):
    c = Case(shape, dtype)
    torch.library.opcheck(ops.sparse_up_.default, (c.into_wide, c.narrow, *c.factors))
    torch.library.opcheck(ops.sparse_down_.default, (c.into_narrow, c.wide, *c.factors))
    for into in (None, c.into_narrow):
        torch.library.opcheck(ops.sparse_gradients.default, (c.narrow, c.wide, into, *c.factors))


@pytest.mark.parametrize("strategy", ["factored", "materialized"])
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_opcheck_of_the_layer(shape, strategy):
    c = Case(shape, torch.float32)
    pattern, lam, gamma, _ = c.factors
    x, grad = (c.narrow, c.wide) if shape[0] <= shape[1] else (c.wide, c.narrow)
    given = x, None, None, None, lam, gamma, pattern, None
    options = op_options(torch.float32, strategy)
    torch.library.opcheck(ops.linear_backward.default, (grad, *given), {**options, **ALL_GRADIENTS})
    torch.library.opcheck(ops.linear.default, (x, None, *given[1:]), {**options, "out_features": shape[1]})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"wide": torch.zeros(6, 41)}, ValueError, r"wide side must be contiguous with shape \[7, 41\]"),
        ({"wide": torch.zeros(7, 41).double()}, TypeError, "wide side must have dtype Float, got Double"),
        ({"wide": torch.zeros(7)}, ValueError, r"tokens must have shape \[T, m\] or \[T, M\], got \[7\]"),
        ({"narrow": torch.zeros(24, 7).t()}, ValueError, r"narrow side must be contiguous with shape \[7, 24\]"),
        ({"narrow": torch.zeros(7, 24).int()}, TypeError, "tokens must be float64, float32, bfloat16 or float16"),
        ({"into_narrow": torch.zeros(7, 41)}, ValueError, r"into_narrow must be contiguous with shape \[7, 24\]"),
        ({"lam": torch.zeros(5, 3)}, ValueError, r"randlora_gamma must have shape \[n, m\] with n = 3"),
        ({"lam": torch.zeros(4, 5)}, ValueError, "these bases have a row 4, so r must be larger"),
        ({"pattern": []}, ValueError, "pattern must be columns, a_starts, a_entries, b_starts and b_indices, got 0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(change, error, message):
    c = Case((24, 41, 5), torch.float32)
    given = {"narrow": c.narrow, "wide": c.wide, "into_narrow": c.into_narrow, "pattern": c.factors[0], "lam": c.lam}
    before = [t.clone() for t in (c.into_narrow, c.into_wide)]
    narrow, wide, into, pattern, lam = (given | change).values()
    with pytest.raises(error, match=message):
        ops.sparse_gradients(narrow, wide, into, pattern, lam, c.gamma, 0.7)
    if "into_narrow" not in change:
        with pytest.raises(error, match=message):
            if "wide" in change:
                ops.sparse_up_(wide, narrow, pattern, lam, c.gamma, 0.7)
            else:
                ops.sparse_down_(narrow, wide, pattern, lam, c.gamma, 0.7)
    assert all(map(torch.equal, before, (c.into_narrow, c.into_wide)))
