"""Ternary bases as lists, planes and bits: the numbers of their dense expansion, at a fraction of the bytes."""

import pytest
import torch
import torch.nn.functional as F
from helpers.common import (
    FLOATS,
    assert_no_worse_than_plain,
    assert_same_bits,
    make_bases,
    make_layer,
    normal,
    on_devices,
    over,
)
from helpers.saved_bytes import SavedBytes
from helpers.ternary import FORMS, draw

import randlora
from randlora.bases.patterns import StoredBits, StoredLists, StoredPlanes
from randlora.functional import linear
from randlora.ops.pattern import is_bits, is_packed

SHAPES = [(41, 64, 5), (64, 41, 5), (3, 1, 4), (1, 1, 1), (33, 33, 40), (130, 341, 32), (341, 130, 32), (600, 520, 7)]
STRATEGIES = ("factored", "materialized", "merged")

forms = pytest.mark.parametrize("form", FORMS)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}to{s[1]}r{s[2]}")


def gradients(y, inputs):
    return torch.autograd.grad(y, inputs, normal(*y.shape, seed=9, dtype=y.dtype, device=y.device))


@on_devices
@forms
@shapes
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_same_as_the_dense_expansion(form, shape, strategy, dropout, device):
    if strategy == "merged" and dropout:
        pytest.skip("merged takes no dropout")
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


# ---- layers ----------------------------------------------------------------------------------------------------------


def layer_of(form, in_features=96, out_features=130, r=8, **arguments):
    return make_layer(
        in_features, out_features, r, bases=make_bases(in_features, out_features, r, **FORMS[form]), **arguments
    )


@forms
@over("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_layer_keeps_its_input_and_never_expands_its_bases(form, dtype, dropout):
    layer = layer_of(form, dtype=dtype, randlora_dropout=dropout)
    x = normal(64, 96, dtype=dtype).requires_grad_()
    bases = layer.bases["default"]
    layer(x)  # makes the pattern
    with SavedBytes([*layer.parameters(), *bases.pattern(96)[0]]) as saved:
        y = layer(x)
    y.sum().backward()
    assert saved.bytes == x.nbytes
    assert not bases.copies.dense and layer.get_delta_weight("default").shape == (130, 96) and not bases.copies.dense


@on_devices
@pytest.mark.parametrize(("kind", "limit"), [("sparse", 4.3), ("very_sparse", 0.8), ("sign", 2.2)])
def test_bytes_of_the_bases(kind, limit, device):
    """In MiB. Dense bases of this size take 64 in fp32; PEFT stores these the same way."""
    bases = randlora.RandomBases(4096, 4096, 32, kind, device=device)
    bases.pattern(4096)
    assert 0.2 * limit < bases.nbytes / 2**20 <= limit


@pytest.mark.parametrize(
    "sparsity, form, planes",
    [(1.0, StoredBits, 1), (2.4, StoredBits, 2), (2.5, StoredPlanes, 2), (9.9, StoredPlanes, 2)],
)
def test_which_form_is_taken(sparsity, form, planes):
    bases = randlora.RandomBases(64, 48, 4, "sparse", sparsity=sparsity)
    pattern, _ = bases.pattern(48)
    assert type(bases.copies.packed[torch.device("cpu")][0]) is form and pattern[-1].shape == (48, planes, 4)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert randlora.bases.patterns.form_of(sparsity, cuda) is StoredBits
    assert [randlora.bases.patterns.form_of(10.0, device) for device in (cpu, cuda)] == [StoredLists, StoredBits]
    assert randlora.RandomBases(64, 48, 4).pattern(48) is None


@forms
def test_layers_of_several_sizes_share_one_pattern(form):
    bases = randlora.RandomBases(64, 48, 4, **FORMS[form])
    layers = [make_layer(i, o, 4, bases=bases) for i, o in ((48, 64), (20, 33), (64, 16))]
    x = [normal(5, layer.in_features) for layer in layers]
    y = [layer(t) for layer, t in zip(layers, x, strict=True)]
    nbytes = bases.nbytes
    layers.append(make_layer(100, 80, 4, bases=bases))  # the store grows, and keeps its values
    layers[-1](normal(3, 100))
    assert bases.nbytes > nbytes
    for layer, t, before in zip(layers, x, y, strict=False):
        torch.testing.assert_close(layer(t), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("values", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["lists", "planes"])
def test_pefts_ternary_bases_are_recognised(form, values):
    """PEFT stores them dense in fp32 and divided by their standard deviation."""
    drawn = randlora.RandomBases(130, 96, 8, **FORMS[form]).draw(torch.float32, torch.device("cpu"))
    A, B = ((t / t.std()).to(values) for t in drawn)
    layer = make_layer(96, 130, 8, randlora_A=A, randlora_B=B)
    x = normal(7, 96)
    exact = x.double() @ (
        layer.weight.double()
        + randlora.functional.delta_weight(
            A.double(), B.double(), layer.randlora_lambda["default"].double(), layer.randlora_gamma["default"].double(),
            layer.scaling["default"], 96, 130,
        )
    ).T + layer.bias.double()  # fmt: skip
    torch.testing.assert_close(layer(x).double(), exact, rtol=2e-5, atol=2e-5)
    pattern = layer.pattern("default")
    assert len(pattern) == (5 if form == "lists" else 3)
    assert make_layer(96, 130, 8).pattern("default") is None


@pytest.mark.parametrize("form", ["bits", "sign"])
def test_given_bases_stay_dense_where_packing_saves_nothing(form):
    A, B = (1.7 * t for t in randlora.RandomBases(130, 96, 8, **FORMS[form]).draw(torch.float32, torch.device("cpu")))
    assert make_layer(96, 130, 8, randlora_A=A, randlora_B=B).pattern("default") is None
    # PEFT's own draw is not kept: where it is bits, it is packed, and the scale is that of its values.
    made, scale = randlora.bases.patterns.of_tensors(A, B, held=False)
    assert type(made) is StoredBits and made.tensors.b_planes.shape[1] == (1 if form == "sign" else 2)
    torch.testing.assert_close(scale, 1.7**2, rtol=1e-6, atol=0)
    got = torch.ops.randlora.packed_expand(made.of(96), 12, 96, 130, torch.float32)
    assert_same_bits(got[0] * A.abs().max(), A)
    assert_same_bits((got[1].t() * B.abs().max()).contiguous(), B.flatten(1))
    mixed, _ = randlora.bases.patterns.of_tensors(A * (A > 0), B, held=False)
    assert type(mixed) is StoredBits and mixed.tensors.b_planes.shape[1] == 2


@forms
def test_compile_autocast_inference_and_merge(form):
    torch._dynamo.reset()
    layer = layer_of(form)
    x = normal(12, 96).requires_grad_()
    expected = layer(x)
    inputs = (x, *layer.randlora_lambda.values(), *layer.randlora_gamma.values())
    wanted = gradients(expected, inputs)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    got = compiled(x)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        gradients(got, (x, *layer.randlora_lambda.values(), *layer.randlora_gamma.values())), wanted, strict=True
    ):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, rtol=0.05, atol=0.3)
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        before = layer.weight.clone()
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        layer.unmerge()
    assert_same_bits(layer.weight, before)


def test_explain_knows_the_forms(capsys):
    for form in ("lists", "planes", "sign"):
        text = randlora.explain(layer_of(form, 512, 512, 32), 4096)
        assert "<- chosen" in text and "factored" in text
    assert capsys.readouterr().out


BAD = {
    "too few": (lambda p: p[:4], ValueError, "pattern must be"),
    "dtype": (lambda p: [p[0].long(), *p[1:]], TypeError, "int32"),
    "shape": (lambda p: [p[0][:, None], *p[1:]], ValueError, "vectors"),
    "starts": (lambda p: [p[0], p[1][:-1], *p[2:]], ValueError, "a_starts must have"),
    "bases": (lambda p: [*p[:3], p[3][:9], p[4]], ValueError, "b_starts must have"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_patterns(case):
    change, error, message = BAD[case]
    _, _, _, lam, gamma, bases = draw((24, 41, 5), "lists")
    with pytest.raises(error, match=message):
        torch.ops.randlora.sparse_update(change(list(bases.pattern(24)[0])), lam, gamma, 41, 1.0, None, torch.float32)


BAD_PLANES = {
    "starts": (lambda p: [p[0][:-1], *p[1:]], ValueError, "a_starts must have shape"),
    "planes": (lambda p: [*p[:2], p[2][:3]], ValueError, "b_planes must have shape"),
    "dtype": (lambda p: [*p[:2], p[2].int()], TypeError, "int16"),
    "one plane": (lambda p: [*p[:2], p[2][:, :1].contiguous()], ValueError, "b_planes must have shape"),
}
BAD_BITS = {
    "rows": (lambda p: [p[0][:-1], p[1]], ValueError, "a_planes must have shape"),
    "more rows": (lambda p: [torch.cat((p[0], p[0])), p[1]], ValueError, "a_planes must have r = 5 rows"),
    "words": (lambda p: [p[0][:, :, :1].contiguous(), p[1]], ValueError, "a_planes must have shape"),
    "planes": (lambda p: [p[0][:, :1].contiguous(), p[1]], ValueError, "b_planes must have shape"),
    "dtype": (lambda p: [p[0].int(), p[1]], TypeError, "a_planes must be int16"),
    "layout": (lambda p: [p[0], p[1].flip(0).transpose(0, 2)], ValueError, "pattern must be contiguous"),
}


@pytest.mark.parametrize("form, case", [("planes", c) for c in BAD_PLANES] + [("bits", c) for c in BAD_BITS])
def test_bad_planes(form, case):
    change, error, message = (BAD_PLANES if form == "planes" else BAD_BITS)[case]
    x, _, _, lam, gamma, bases = draw((24, 41, 5), form)
    pattern = change(list(bases.pattern(24)[0]))
    with pytest.raises(error, match=message):
        torch.ops.randlora.sparse_update(pattern, lam, gamma, 41, 1.0, None, torch.float32)
    with pytest.raises(error, match=message):
        linear(x, None, None, None, None, lam, gamma, 1.0, out_features=41, strategy="factored", pattern=pattern)


@pytest.mark.parametrize("first, rows", [(-1, 2), (0, 6), (5, 1), (0, 0), (6, None)])
def test_rows_outside_of_A(first, rows):
    pattern = randlora.RandomBases(41, 24, 5, "sign").pattern(24)[0]
    with pytest.raises(ValueError, match=r"rows must lie in \[0, r\) = \[0, 5\)"):
        torch.ops.randlora.packed_expand(pattern, 5, 24, 41, torch.float32, first, rows)
