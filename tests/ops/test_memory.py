"""Arguments that do not belong together, or do not describe anything: refused in words before anything is written."""

import copy
import pickle

import pytest
import torch
from helpers.common import normal, on_devices
from helpers.layer_op import ALL_GRADIENTS, op_options

import randlora
from randlora.bases.patterns import Pattern
from randlora.functional import linear, sparse_delta_weight

ops = torch.ops.randlora
BIG = 2**62


def lists(m=512, r=32):
    return randlora.RandomBases(512, m, r, "very_sparse", sparsity=max(10.0, m**0.5)).pattern(m)[0]


def planes():
    return randlora.RandomBases(40, 24, 4, "sparse").pattern(24)[0]


def bits():
    return randlora.RandomBases(40, 24, 4, "sign").pattern(24)[0]


def call(pattern, r, n, in_features, out_features, strategy="auto"):
    x = normal(3, in_features).requires_grad_()
    lam, gamma = normal(r, n).requires_grad_(), normal(n, min(in_features, out_features)).requires_grad_()
    y = linear(
        x, None, None, None, None, lam, gamma, 1.0, out_features=out_features, pattern=pattern, strategy=strategy
    )
    y.sum().backward()


# ---- sizes that are not the pattern's ------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(16, 16, 512, 512), (64, 8, 512, 512), (32, 17, 512, 512), (32, 16, 512, 513),
                                   (32, 16, 513, 512), (32, 16, 600, 600)], ids=str)  # fmt: skip
@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized"])
def test_a_layer_of_other_sizes_than_the_pattern(sizes, strategy):
    call(lists(), 32, 16, 512, 512, strategy)
    with pytest.raises(ValueError, match="this pattern is of bases with r = 32, at most 16 of them"):
        call(lists(), *sizes, strategy)
    with pytest.raises(ValueError, match="this pattern is of bases with r = 32"):
        r, n, i, o = sizes
        sparse_delta_weight(lists(), 1.0, normal(r, n), normal(n, min(i, o)), 1.0, i, o)


@pytest.mark.parametrize("make", [planes, bits])
@pytest.mark.parametrize(
    "sizes", [(3, 6, 24, 40), (5, 4, 24, 40), (4, 7, 24, 40), (4, 6, 25, 40), (4, 6, 24, 41)], ids=str
)
def test_a_layer_of_other_sizes_than_planes_or_bits(make, sizes):
    call(make(), 4, 6, 24, 40)
    with pytest.raises(ValueError, match="this pattern is of bases with r = 4"):
        call(make(), *sizes)


@pytest.mark.parametrize("r, n, m", [(16, 16, 512), (31, 16, 512), (32, 17, 512), (32, 16, 100)])
def test_raw_ops_look_at_the_sizes_of_plain_lists(r, n, m):
    pattern = list(lists())
    lam, gamma, x = normal(r, n), normal(n, m), normal(3, m)
    with pytest.raises(ValueError, match=r"these bases have|b_starts must have"):
        ops.sparse_update(pattern, lam, gamma, 512, 1.0, None, torch.float32)
    grad = normal(len(pattern[0]), 512)
    with pytest.raises(ValueError, match=r"these bases have|b_starts must have"):
        ops.sparse_update_backward(grad, pattern, lam, gamma, 1.0, True, True)
    layer, options = (None, None, lam, gamma, pattern, None), op_options(torch.float32, "materialized") | ALL_GRADIENTS
    with pytest.raises(ValueError, match=r"these bases have|b_starts must have"):
        ops.linear_backward(normal(3, 512), x, None, *layer, **options)


@pytest.mark.cuda
def test_lists_are_for_the_cpu():
    pattern = [t.cuda() for t in lists()]
    lam, gamma, x = normal(32, 16, device="cuda"), normal(16, 512, device="cuda"), normal(3, 512, device="cuda")
    for act in (
        lambda: ops.check_pattern(pattern),
        lambda: linear(x, None, None, None, None, lam, gamma, 1.0, out_features=512, pattern=pattern),
    ):
        with pytest.raises(ValueError, match=r"lists are for the CPU; RandomBases\.pattern gives bits for cuda:0"):
            act()


# ---- contents --------------------------------------------------------------------------------------------------------

WRONG = {
    "columns": {"negative": (0, -1), "large": (-1, 10**9), "unsorted": (0, 300), "twice": (1, None)},
    "a_starts": {"negative": (0, -5), "beyond": (-1, 10**6), "falls": (2, 10**5)},
    "a_entries": {"negative": (0, -2), "large": (-1, 2**30)},
    "b_starts": {"negative": (0, -1), "beyond": (-1, 2**31 - 1), "falls": (5, 0)},
    "b_indices": {"unsorted": (0, 511), "twice": (1, None)},
}
WRONG = [(i, name, key, *where) for i, (name, cases) in enumerate(WRONG.items()) for key, where in cases.items()]


@pytest.mark.parametrize("i, name, key, at, value", WRONG, ids=[f"{w[1]} {w[2]}" for w in WRONG])
@pytest.mark.parametrize("index_dtype", [torch.int16, torch.int32])
def test_lists_with_wrong_contents(i, name, key, at, value, index_dtype):
    pattern = [t.clone() for t in lists(m=40, r=4)]
    if index_dtype == torch.int32:
        pattern[4] = (pattern[4].int() & 0xFFFF).contiguous()
    pattern[i][at] = pattern[i][at - 1] if value is None else value
    lam, gamma, x = normal(4, 10), normal(10, 40), normal(3, 40)
    layer, options = (None, None, lam, gamma, pattern, None), op_options(torch.float32, "materialized") | ALL_GRADIENTS
    calls = (
        lambda: ops.check_pattern(pattern),
        lambda: ops.sparse_update(pattern, lam, gamma, 512, 1.0, None, torch.float32),
        lambda: ops.sparse_update_backward(normal(len(pattern[0]), 512), pattern, lam, gamma, 1.0, 1, 1),
        lambda: ops.linear_backward(normal(3, 512), x, None, *layer, **options),
        lambda: linear(x, None, None, None, None, lam, gamma, 1.0, out_features=512, pattern=pattern),
    )
    for act in calls[key == "large" :]:  # these could be those of a larger layer
        with pytest.raises(ValueError, match=r"must ascend|must not fall|must lie in|these bases have"):
            act()


@pytest.mark.parametrize("start", [1, -1, 2**30, -(2**31)])
def test_no_lists_have_no_elements(start):
    """The gradient is counted by the last of the starts, which is the first one here."""
    pattern = list(lists(12, 2))
    pattern[0], pattern[2] = pattern[0][:0], pattern[2][:0]
    lam, gamma, grad = normal(2, 6), normal(6, 12), normal(0, 512)
    pattern[1] = torch.zeros(1, dtype=torch.int32)
    for gradient in ops.sparse_update_backward(grad, pattern, lam, gamma, 1.0, True, True):
        assert not gradient.any()
    pattern[1] = torch.tensor([start], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"the start of .* must lie in \[0, 0\]"):
        ops.sparse_update_backward(grad, pattern, lam, gamma, 1.0, True, True)


@on_devices
@pytest.mark.parametrize("i, at, value", [(0, 0, -1), (0, 2, 10**6), (0, -1, 10**6), (1, 0, -4), (1, 0, 60)])
def test_planes_with_wrong_contents(i, at, value, device):
    pattern = [t.clone() for t in planes()]
    pattern[i][at] = value
    pattern = [t.to(device) for t in pattern]
    for act in (
        lambda: ops.check_pattern(pattern),
        lambda: ops.packed_expand(pattern, 6, 24, 40, torch.float32),
        lambda: ops.sparse_update(
            pattern, normal(4, 6, device=device), normal(6, 24, device=device), 40, 1.0, None, torch.float32
        ),
    ):
        with pytest.raises(ValueError, match=r"must ascend|must not fall|must lie in"):
            act()


def test_lists_that_are_written_to_are_looked_at_again():
    bases = randlora.RandomBases(64, 40, 4, "very_sparse", sparsity=10.0)
    pattern = bases.pattern(40)[0]
    call(pattern, 4, 10, 40, 64)
    was = pattern[4][0].clone()
    pattern[4][0] = 32767
    with pytest.raises(ValueError, match="b_indices must ascend"):
        call(pattern, 4, 10, 40, 64)
    pattern[4][0] = was
    call(pattern, 4, 10, 40, 64)
    pattern[4].data = torch.flip(pattern[4], (0,))  # the same tensor and version, other memory
    with pytest.raises(ValueError, match="b_indices must ascend"):
        call(pattern, 4, 10, 40, 64)
    with torch.inference_mode():  # no version to go by
        other = [t.clone() for t in planes()]
        ops.packed_expand(other, 6, 24, 40, torch.float32)
        other[1][0] = -7
        with pytest.raises(ValueError, match="a_entries must ascend"):
            ops.packed_expand(other, 6, 24, 40, torch.float32)


def test_a_pattern_is_checked_when_it_is_made():
    pattern = lists(m=40, r=4)
    tensors = [t.clone() for t in pattern]
    tensors[3][4] = 10**6
    with pytest.raises(ValueError, match="the starts of b_indices must not fall"):
        Pattern(tensors, 4, 10, 40, 512)
    for same in (copy.deepcopy(pattern), pickle.loads(pickle.dumps(pattern))):
        assert (same.r, same.num_bases, same.min_dim, same.max_dim) == (4, 10, 40, 512)
        assert all(torch.equal(a, b) for a, b in zip(same, pattern, strict=True))


# ---- numbers without sense -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [planes, bits])
@pytest.mark.parametrize("wrong", [{"n": BIG}, {"n": 0}, {"n": -1}, {"n": 2**31}, {"min_dim": BIG}, {"min_dim": 0},
                                   {"max_dim": BIG}, {"max_dim": 2**63 - 1}, {"first": BIG}, {"first": -1},
                                   {"first": 4}, {"first": -(2**63)}, {"first": 2**63 - 1, "rows": 2**63 - 1},
                                   {"rows": 0}, {"rows": 5}, {"rows": BIG}, {"rows": -(2**63)}], ids=str)  # fmt: skip
def test_packed_expand_of_any_numbers(make, wrong):
    arguments = {"n": 6, "min_dim": 24, "max_dim": 40, "first": 1, "rows": 2} | wrong
    name = "m" if "min_dim" in wrong else next(iter(wrong))
    named = r"rows must lie in \[0, r\)" if name in ("first", "rows") else f"{name} must be at least 1 and at most"
    with pytest.raises(ValueError, match=named):
        ops.packed_expand(list(make()), dtype=torch.float32, **arguments)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_only_floating_dtypes(dtype):
    A, B = randlora.RandomBases(12, 7, 3).tensors()
    x, lam, gamma, w = normal(2, 7), normal(3, 2), normal(2, 7), normal(12, 7)
    good = {"x": x, "weight": w, "bias": normal(12), "A": A, "B": B, "randlora_lambda": lam, "randlora_gamma": gamma}
    options = op_options(torch.float32, "factored")
    with pytest.raises(TypeError, match="dtype must be float64"):
        ops.linear(*good.values(), [], None, **{**options, "dtype": dtype, "out_features": 12})
    for name, t in good.items():
        with pytest.raises(TypeError, match=f"{name} must be float64, float32, bfloat16 or float16, got"):
            ops.linear(*(good | {name: t.to(dtype)}).values(), [], None, **options, out_features=12)
    with pytest.raises(TypeError, match="grad must be float64"):
        grad = w[:2, :1].to(dtype).expand(2, 12)
        ops.linear_backward(grad, x, w, A, B, lam, gamma, [], None, **options, **ALL_GRADIENTS)


@pytest.mark.parametrize("lam", [(3, 0), (0, 2), (3,), ()], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized", "merged"])
def test_sizes_of_zero(lam, strategy):
    A, B = randlora.RandomBases(12, 7, 3).tensors()
    for x, shape in ((normal(2, 7), lam), (normal(2, 0), (3, 2)), (normal(0, 0), (3, 2))):
        with pytest.raises(ValueError, match="none of them 0, got"):
            linear(x, normal(12, x.shape[-1]), None, A, B, normal(*shape), normal(shape[-1] if shape else 1, 7), 1.0,
                   strategy=strategy)  # fmt: skip
    with pytest.raises(ValueError, match="none of them 0, got"):
        linear(normal(2, 7), None, None, A, B, normal(3, 2), normal(2, 7), 1.0, strategy=strategy, out_features=0)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_a_probability(p, training):
    A, B = randlora.RandomBases(12, 7, 3).tensors()
    with pytest.raises(ValueError, match="dropout must be at least 0 and below 1, got"):
        linear(normal(2, 7), normal(12, 7), None, A, B, normal(3, 2), normal(2, 7), 1.0, p, training)


@pytest.mark.parametrize("seed", [torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor([], dtype=torch.int64),
                                  torch.tensor([1], dtype=torch.int32)], ids=str)  # fmt: skip
def test_seeds_are_one_int64(seed):
    A, B = randlora.RandomBases(12, 7, 3).tensors()
    with pytest.raises((TypeError, ValueError), match="seed must"):
        linear(normal(2, 7), normal(12, 7), None, A, B, normal(3, 2), normal(2, 7), 1.0, 0.5, seed=seed)


# ---- fill_bases_ -----------------------------------------------------------------------------------------------------


@on_devices
def test_fill_refuses_memory_that_elements_share(device):
    flat = torch.zeros(60, device=device)
    for out in (flat[:15].view(1, 3, 5).expand(4, 3, 5), flat[:20].view(4, 1, 5).expand(4, 3, 5),
                flat.as_strided((4, 3, 5), (15, 4, 1)), flat.as_strided((4, 3, 5), (2, 5, 1))):  # fmt: skip
        with pytest.raises(ValueError, match="out must have an element of memory for each of its elements"):
            ops.fill_bases_(out, 0, 1, (0, 0, 0))
    assert not flat.any(), "refused, but written to"
    for out in (
        flat.view(4, 3, 5),
        flat.view(3, 4, 5).transpose(0, 1),
        flat.view(3, 4, 5)[:, ::2, 1:4],
        flat[:5].view(1, 1, 5).expand(1, 1, 5),
    ):
        ops.fill_bases_(out, 0, 1, (0, 0, 0))


@on_devices
def test_fill_is_an_in_place_write_to_autograd(device):
    leaf = torch.zeros(4, 3, 5, device=device, requires_grad=True)
    for out in (leaf, leaf[1:], leaf.view(4, 3, 5)):
        with pytest.raises(ValueError, match=r"out requires a gradient.*torch\.no_grad"):
            ops.fill_bases_(out, 0, 1, (0, 0, 0))
    assert not leaf.any()
    with torch.no_grad():
        ops.fill_bases_(leaf, 0, 1, (0, 0, 0))
    assert leaf.all() and leaf._version == 1
    kept, w = torch.zeros(4, 3, 5, device=device), torch.ones(4, 3, 5, device=device, requires_grad=True)
    product = (kept * w).sum()
    ops.fill_bases_(kept, 0, 1, (0, 0, 0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():
        inference = torch.zeros(4, 3, 5, device=device)
        ops.fill_bases_(inference, 0, 1, (0, 0, 0))
    with pytest.raises(RuntimeError, match="inference tensor"):
        ops.fill_bases_(inference, 0, 1, (0, 0, 0))
