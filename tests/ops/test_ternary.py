"""Ternary bases as lists, planes and bits: the numbers of their dense expansion, at a fraction of the bytes."""

import pytest
import torch
import torch.nn.functional as F
from helpers.common import (
    FLOATS,
    STRATEGIES,
    assert_no_worse_than_plain,
    assert_same_bits,
    normal,
    on_devices,
    over,
    strategies_and_dropout,
)
from helpers.layer_op import gradients
from helpers.ternary import FORMS, draw

import randlora
from randlora.bases.patterns import StoredBits, StoredLists, StoredPlanes
from randlora.functional import linear
from randlora.ops.pattern import is_bits, is_packed

SHAPES = [(41, 64, 5), (64, 41, 5), (3, 1, 4), (1, 1, 1), (33, 33, 40), (130, 341, 32), (341, 130, 32), (600, 520, 7)]

forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}r{s[2]}")


@on_devices
@forms
@shapes
@strategies_and_dropout
def test_same_as_the_dense_expansion(form, shape, strategy, dropout, device):
    x, weight, bias, lam, gamma, bases = draw(shape, form, device=device)
    found = bases.pattern(min(shape[:2]), x.device)
    dense = bases.draw(torch.float64, x.device)
    seed = torch.tensor([3], device=device)
    for transposed in (False, True):
        w = weight.t().contiguous() if transposed else weight
        same = {"strategy": strategy, "seed": seed, "weight_is_transposed": transposed}
        y = linear(x, w, bias, None, None, lam, gamma, 0.7 * found[1], dropout, pattern=found[0], **same)
        expected = linear(x, w, bias, *dense, lam, gamma, 0.7 * bases.scale, dropout, **same | {"strategy": "factored"})
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
        for got, wanted in zip(gradients(y, (x, lam, gamma)), gradients(expected, (x, lam, gamma)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@on_devices
@forms
@pytest.mark.parametrize("shape", SHAPES[5:7], ids=str)
@over("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_low_precision_is_no_worse_than_plain(form, shape, dtype, device):
    x, weight, bias, lam, gamma, bases = draw(shape, form, dtype, device, tokens=20)
    found = bases.pattern(min(shape[:2]), x.device)
    A, B = bases.draw(torch.float64, x.device)

    def plain(dtype, parameters):
        xs, lams, gammas = (
            t.detach().to(d).requires_grad_() for t, d in ((x, dtype), (lam, parameters), (gamma, parameters))
        )
        update = randlora.functional.delta_weight(
            A.to(parameters), B.to(parameters), lams, gammas, 0.7 * bases.scale, *shape[:2]
        )
        y = F.linear(xs, weight.to(dtype), bias.to(dtype)) + F.linear(xs, update.to(dtype))
        return y, *gradients(y, (xs, lams, gammas))

    y = linear(x, weight, bias, None, None, lam, gamma, 0.7 * found[1], strategy="auto", pattern=found[0])
    results = y, *gradients(y, (x, lam, gamma))
    for got, rough, exact in zip(
        results, plain(dtype, torch.float32), plain(torch.float64, torch.float64), strict=True
    ):
        assert_no_worse_than_plain(got, rough, exact)


@on_devices
@forms
@over("dtype", FLOATS)
@pytest.mark.parametrize("size", [(341, 130, 7), (41, 3, 3), (1, 1, 1), (64, 48, 5), (1000, 16, 4)], ids=str)
def test_forms_expand_to_the_same_bits(form, size, dtype, device):
    (M, m, r), device = size, torch.device(device)
    bases = randlora.RandomBases(*size, seed=3, **FORMS[form])
    A, B = bases.draw(dtype, device)
    pattern, n = bases.pattern(m, device)[0], bases.num_bases
    if is_packed(pattern):
        got, transposed = torch.ops.randlora.packed_expand(pattern, n, m, M, dtype)
        assert_same_bits(got, A)
        assert_same_bits(transposed.t().contiguous(), B.flatten(1))
        # A smaller layer, and some rows of A: the columns of B2 by their position.
        part = max(1, n - 1), max(1, m - 1), max(1, M - 17)
        rows = torch.ops.randlora.packed_expand(pattern, *part, dtype, r // 2, r - r // 2)
        flat = B[: part[2], : part[0]].flatten(1)
        assert_same_bits(rows[0], A[r // 2 :, :, : part[1]].contiguous())
        assert_same_bits(rows[1], flat[:, r // 2 * part[0] :].t().contiguous())
        last = torch.ops.randlora.packed_expand(pattern, *part, dtype, r - 1)
        assert_same_bits(last[1], rows[1][-part[0] :])
        return
    columns, a_starts, a_entries, b_starts, b_indices = (t.long().cpu() for t in pattern)
    got_A, got_B = torch.zeros(r, m, dtype=dtype), torch.zeros(M, n * r, dtype=dtype)
    for c, j in enumerate(columns.tolist()):
        for e in a_entries[a_starts[c] : a_starts[c + 1]].tolist():
            got_A[e >> 1, j] = -1 if e & 1 else 1
    for p in range(2 * n * r):
        got_B[b_indices[b_starts[p] : b_starts[p + 1]] & 0xFFFF, p // 2] = -1 if p & 1 else 1
    assert_same_bits(got_A, A[:, 0].cpu())
    assert_same_bits(got_B, B.flatten(1).cpu())


@pytest.mark.cuda
@over("dtype", FLOATS)
def test_planes_expand_on_cuda(dtype):
    """CUDA's own form are bits, but the ops take the CPU's planes too."""
    bases = randlora.RandomBases(341, 130, 7, kind="sparse")
    pattern = bases.pattern(130)[0]
    there = [t.cuda() for t in pattern]
    assert not is_bits(pattern)
    for first in (0, 3):
        on_cpu = torch.ops.randlora.packed_expand(pattern, 18, 120, 333, dtype, first, 4)
        on_cuda = torch.ops.randlora.packed_expand(there, 18, 120, 333, dtype, first, 4)
        for a, b in zip(on_cpu, on_cuda, strict=True):
            assert_same_bits(a, b.cpu())
    lam, gamma = normal(7, 18, dtype=torch.float64), normal(18, 120, seed=1, dtype=torch.float64)
    rows = torch.ops.randlora.sparse_update(pattern, lam, gamma, 333, 0.7, None, torch.float64)
    got = torch.ops.randlora.sparse_update(there, lam.cuda(), gamma.cuda(), 333, 0.7, None, torch.float64)
    torch.testing.assert_close(got.cpu(), rows, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("which", ["empty row", "full row", "empty column", "one column", "all zero B", "last rows"])
@pytest.mark.parametrize("make", [StoredLists, StoredPlanes, StoredBits])
def test_odd_patterns(which, make):
    """Patterns that random bases have now and then."""
    r, n, m, M = 4, 5, 17, 37
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randint(-1, 2, size, dtype=torch.int8, generator=generator) for size in ((r, m), (M, n * r)))
    if which == "empty row":
        A[1] = 0
    elif which == "full row":
        A[2] = 1
    elif which == "empty column":
        A[:, 3:5] = 0
    elif which == "one column":
        A[:, 1:] = 0
    elif which == "all zero B":
        B.zero_()
    else:
        B[: M - 1] = 0
    pattern = make(A, iter([B[:, :8], B[:, 8:]]), M).of(m)
    lam, gamma = (
        normal(r, n, dtype=torch.float64).requires_grad_(),
        normal(n, m, seed=1, dtype=torch.float64).requires_grad_(),
    )
    for i, o in ((m, M), (M, m)):
        got = randlora.functional.sparse_delta_weight(pattern, 2.0, lam, gamma, 0.7, i, o)
        dense = A[:, None].double(), B.view(M, n, r).double()
        expected = randlora.functional.delta_weight(*dense, lam, gamma, 1.4, i, o)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(gradients(got, (lam, gamma)), gradients(expected, (lam, gamma)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@on_devices
@forms
@pytest.mark.parametrize("with_weight", [True, False])
def test_op(form, with_weight, device):
    x, weight, _, lam, gamma, bases = draw((24, 41, 5), form, device=device, num_bases=3)
    found = bases.pattern(24, x.device)
    arguments = (list(found[0]), lam, gamma, 41, 0.7, weight.t() if with_weight else None, torch.float64)
    torch.library.opcheck(torch.ops.randlora.sparse_update, arguments)
    rows = torch.ops.randlora.sparse_update(*arguments)
    if not with_weight:
        checked = (rows.detach(), list(found[0]), lam.detach(), gamma.detach(), 0.7, True, True)
        torch.library.opcheck(torch.ops.randlora.sparse_update_backward, checked)
    assert torch.autograd.gradcheck(
        lambda a, b: torch.ops.randlora.sparse_update(list(found[0]), a, b, 41, 0.7, arguments[5], torch.float64),
        (lam, gamma),
    )
    again = torch.ops.randlora.sparse_update(*arguments)
    assert_same_bits(rows, again)


@on_devices
@pytest.mark.parametrize("form", ["planes", "bits", "sign"])
@over("dtype", FLOATS)
def test_packed_expand_op(form, dtype, device):
    bases = randlora.RandomBases(41, 24, 5, **FORMS[form])
    pattern = list(bases.pattern(24, torch.device(device))[0])
    for rows in ((), (2,), (1, 3)):
        torch.library.opcheck(torch.ops.randlora.packed_expand, (pattern, 5, 24, 41, dtype, *rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["planes", "bits"])
@pytest.mark.parametrize("with_weight", [True, False])
def test_16_bit_updates_are_rounded_once(form, with_weight, dtype):
    """The sums are fp32, also under autocast, and in the layout of a transposed weight."""
    _, weight, _, lam, gamma, bases = draw((130, 341, 32), form, torch.float32)
    pattern = bases.pattern(130)[0]
    weight = weight.t().to(dtype) if with_weight else None
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.ops.randlora.sparse_update(pattern, lam, gamma, 341, 0.7, weight, dtype)
    base = torch.zeros(130, 341) if weight is None else weight
    exact = base.double() + torch.ops.randlora.sparse_update(
        pattern, lam.double(), gamma.double(), 341, 0.7, None, torch.float64
    )
    assert got.dtype == dtype and (weight is None or got.stride() == weight.stride())
    unit = torch.finfo(dtype).eps / 2
    assert ((got.double() - exact).abs() <= 1.01 * unit * exact.abs() + 1e-5).all()


@pytest.mark.parametrize("form", ["planes", "bits", "sign"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(41, 300, 8), (300, 41, 8)], ids=str)
def test_bases_are_made_dense_in_groups(form, strategy, shape):
    """`workspace` bounds them, and how many there are changes no more than the order of additions."""
    x, weight, bias, lam, gamma, bases = draw(shape, form)
    pattern, scale = bases.pattern(41)
    results, groups = [], []
    for workspace in (0, 3 * 6 * 8 * (300 + 2 * 41 + 2 * 12), 1):  # all, three rows, one row of A's eight
        with torch.profiler.profile() as profile:
            y = linear(x, weight, bias, None, None, lam, gamma, 0.7 * scale, strategy=strategy, pattern=pattern,
                       workspace=workspace)  # fmt: skip
        groups.append(sum(e.name == "randlora::packed_expand" for e in profile.events()))
        results.append((y, *gradients(y, (x, lam, gamma))))
    built = form == "planes" and strategy != "factored"
    assert groups == ([0, 0, 0] if built else [1, 3, 8])
    for some in results[1:]:
        for a, b in zip(results[0], some, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype, groups", [(torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 1)], ids=str)
def test_without_a_limit_some_4_mib_are_dense_at_a_time(dtype, groups):
    """In 16 bits all at once, as the result of every group is rounded; but not where such products are made in fp32."""
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        groups = 4
    bases = randlora.RandomBases(2048, 2048, 32, "sparse")
    pattern, x = bases.pattern(2048)[0], normal(2, 2048, dtype=dtype)
    lam, gamma = normal(32, 64, seed=1) / 32, normal(64, 2048, seed=2) / 8
    with torch.profiler.profile() as profile:
        y = linear(x, None, None, None, None, lam, gamma, 1.0, strategy="factored", out_features=2048, pattern=pattern)
    assert sum(e.name == "randlora::packed_expand" for e in profile.events()) == groups
    exact = x.double() @ randlora.functional.sparse_delta_weight(pattern, 1.0, lam, gamma, 1.0, 2048, 2048).double().T
    assert (y.double() - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm() + 1e-5 * exact.norm()


def test_products_through_h_do_not_depend_on_threads():
    """Of the tokens with lists (csrc/sparse_products.h), with more tiles of tokens than groups of their sums."""
    x, _, _, lam, gamma, bases = draw((341, 300, 32), "lists", torch.float32, tokens=1500)
    pattern, before = bases.pattern(300)[0], torch.get_num_threads()
    results = []
    try:
        for threads in (1, 3, 2):
            torch.set_num_threads(threads)
            y = linear(
                x, None, None, None, None, lam, gamma, 1.0, strategy="factored", out_features=300, pattern=pattern
            )
            results.append((y, *gradients(y, (x, lam, gamma))))
    finally:
        torch.set_num_threads(before)
    for some in results[1:]:
        for a, b in zip(results[0], some, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("form", ["lists", "planes"])  # bits are MKL's products
def test_results_do_not_depend_on_threads(form, threads):
    _, _, _, lam, gamma, bases = draw((300, 341, 32), form, torch.float32)
    (pattern, _), before = bases.pattern(300), torch.get_num_threads()
    rows = torch.ops.randlora.sparse_update(pattern, lam, gamma, 341, 1.0, None, torch.float32)
    expected = rows, *torch.ops.randlora.sparse_update_backward(rows, pattern, lam, gamma, 1.0, True, True)
    try:
        torch.set_num_threads(threads)
        rows = torch.ops.randlora.sparse_update(pattern, lam, gamma, 341, 1.0, None, torch.float32)
        got = rows, *torch.ops.randlora.sparse_update_backward(rows, pattern, lam, gamma, 1.0, True, True)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
