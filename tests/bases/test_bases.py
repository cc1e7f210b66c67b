"""The values of the random bases: bit for bit those of the definition, for every slice, dtype and thread count."""

import math

import numpy as np
import pytest
import torch
from helpers import golden_bases
from helpers.common import FLOATS, dtype_id, on_devices, over, run_python

from randlora import RandomBases, build_info

GOLDEN = golden_bases.load_golden()
SPARSITIES = {"dense": None, "sparse": 3.0, "very_sparse": math.sqrt(1000), "sign": 1.0}


def fill(out, seed, stream, offsets=(0, 0, 0), sparsity=None):
    signed = seed - 2**64 if seed >= 2**63 else seed
    torch.ops.randlora.fill_bases_(out, signed, stream, offsets, sparsity)
    return out


def filled(shape, seed=0, stream=0, offsets=(0, 0, 0), sparsity=None, dtype=torch.float32, device="cpu"):
    """A slice in a tensor that was full of something else."""
    return fill(torch.full(shape, 77, dtype=dtype, device=device), seed, stream, offsets, sparsity)


def assert_bits(got, values, what=""):
    """`got` holds the numpy `values`, rounded to its dtype."""
    assert torch.equal(got.cpu(), torch.from_numpy(values).to(got.dtype)), what


# ---- the definition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_the_numpy_generator_gives_random123s_known_answers(counter, key, expected):
    assert " ".join(f"{int(word):08x}" for word in golden_bases.philox(counter, key)) == expected


def test_the_golden_file_is_what_the_numpy_generator_writes():
    assert golden_bases.GOLDEN.read_text() == golden_bases.golden_text()


@on_devices
@pytest.mark.parametrize(
    "kind, dtype",
    [(k, t) for k in golden_bases.SPARSITIES for t in FLOATS]
    + [(k, torch.int8) for k in golden_bases.SPARSITIES if k != "dense"],
    ids=lambda value: value if isinstance(value, str) else dtype_id(value),
)
def test_golden_values(kind, dtype, device):
    for case in GOLDEN:
        if case["kind"] == kind:
            got = filled(case["shape"], case["seed"], case["stream"], case["offsets"], case["sparsity"], dtype, device)
            assert_bits(got, case["values"], f"{case['tensor']} at {case['offsets']}, seed {case['seed']}")


@on_devices
@pytest.mark.parametrize("columns", [1, 3, 41, 341, 1000])
@pytest.mark.parametrize("r", [1, 3, 4, 5, 32])
def test_odd_sizes_of_every_kind_and_dtype(r, columns, device):
    for stream, shape in ((0, (r, 1, columns)), (1, (columns, 3, r))):
        for kind, sparsity in SPARSITIES.items():
            expected = golden_bases.block(5, stream, (0, 0, 0), shape, sparsity)
            for dtype in FLOATS if kind == "dense" else (*FLOATS, torch.int8):
                got = filled(shape, 5, stream, sparsity=sparsity, dtype=dtype, device=device)
                assert_bits(got, expected, f"{kind} {dtype} {'AB'[stream]}")


@on_devices
@over("dtype", (*FLOATS, torch.int8))
@pytest.mark.parametrize("stream", [3, 4, 5])
def test_signs(stream, dtype, device):
    for seed, first, count in ((0, 0, 1), (2**63 + 5, 3, 341), (2**32 + 1, 1000, 41)):
        got = filled((1, 1, count), seed, stream, (0, 0, first), dtype=dtype, device=device)
        assert_bits(got[0, 0], golden_bases.signs(seed, stream, np.arange(first, first + count)), f"from {first}")


@on_devices
def test_golden_values_of_hadamard_bases(device):
    for case in (case for case in GOLDEN if case["kind"] == "hadamard"):
        bases = RandomBases(2000, 500, case["r"], "hadamard", case["seed"], group_width=case["group_width"])
        out = torch.full(case["shape"], 77, dtype=torch.int8, device=device)
        got = bases.fill(out, case["stream"], case["offsets"])
        assert_bits(got, case["values"], f"{case['tensor']} at {case['offsets']}, seed {case['seed']}, r {case['r']}")


SLICES_OF_A = [((0, 0, 0), (9, 1, 1003)), ((1, 0, 1), (3, 1, 41)), ((8, 0, 7), (1, 1, 341)), ((2, 0, 1002), (5, 1, 1))]
SLICES_OF_B = [
    ((0, 0, 0), (61, 11, 37)),
    ((1, 1, 1), (3, 5, 3)),
    ((60, 3, 2), (1, 7, 35)),
    ((7, 10, 36), (41, 1, 1)),
    ((5, 2, 4), (31, 3, 32)),
    ((0, 1, 5), (61, 10, 4)),
]


@on_devices
@pytest.mark.parametrize("sparsity", [None, 3.0], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("stream", "whole", "offsets", "shape"),
    [(0, (9, 1, 1003), *s) for s in SLICES_OF_A] + [(1, (61, 11, 37), *s) for s in SLICES_OF_B],
)
def test_a_slice_is_the_slice_of_a_larger_base(stream, whole, offsets, shape, sparsity, device):
    larger = filled(whole, 3, stream, sparsity=sparsity, device=device)
    inside = tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))
    assert torch.equal(filled(shape, 3, stream, offsets, sparsity, device=device), larger[inside])


@on_devices
@over("dtype", (*FLOATS, torch.int8))
@pytest.mark.parametrize(
    "strided",
    [
        lambda t: t[:, :, :41],
        lambda t: t[:, :, 2:43],
        lambda t: t[:, ::2, 3:35],
        lambda t: t[::3, 1:, 1:2],
        lambda t: t.transpose(0, 1)[:, :, :32],
        lambda t: t[:, :, 1::64],  # one column: its stride says nothing
    ],
    ids=["narrow", "unaligned", "every-other", "one-column", "transposed", "one-column-strided"],
)
def test_strided_tensors(strided, dtype, device):
    sparsity = 3.0 if dtype == torch.int8 else None
    storage = torch.full((7, 6, 50), 77, dtype=dtype, device=device)
    out = strided(storage)
    fill(out, 9, 1, (4, 5, 6), sparsity)
    assert_bits(out, golden_bases.block(9, 1, (4, 5, 6), tuple(out.shape), sparsity))
    out.fill_(77)
    assert (storage == 77).all(), "something outside the slice was written"


@on_devices
@pytest.mark.parametrize("shape", [(0, 1, 8), (3, 0, 8), (3, 1, 0)])
def test_empty_slices_are_allowed(shape, device):
    fill(torch.empty(shape, device=device), 0, 1)


@pytest.mark.parametrize("sparsity", [None, 3.0], ids=["dense", "sparse"])
@pytest.mark.parametrize(
    ("stream", "shape"), [(0, (257, 1, 1003)), (1, (1003, 9, 33))], ids=["A257x1003", "B1003x9x33"]
)
def test_the_number_of_threads_changes_nothing(stream, shape, sparsity):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(filled(shape, 1, stream, sparsity=sparsity))
    finally:
        torch.set_num_threads(before)
    assert_bits(results[0], golden_bases.block(1, stream, (0, 0, 0), shape, sparsity))
    assert all(torch.equal(results[0], other) for other in results[1:])


HASH_EVERYTHING = """
import hashlib, json, torch, randlora
digest = hashlib.sha256()
floats = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
slices = (
    (0, (5, 1, 1003), (0, 0, 0)),
    (0, (3, 1, 341), (1, 0, 3)),
    (1, (67, 5, 32), (0, 0, 0)),
    (1, (41, 3, 5), (9, 2, 1)),
)
for sparsity in (None, 1.0, 3.0, 1000**0.5):
    for dtype in floats if sparsity is None else (*floats, torch.int8):
        for stream, shape, offsets in slices:
            out = torch.empty(shape, dtype=dtype)
            torch.ops.randlora.fill_bases_(out, -5, stream, offsets, sparsity)
            digest.update(out.view(torch.uint8).numpy().tobytes())
A, lam, gamma = (torch.arange(r * m).double().mul(0.37).sin().view(r, m) for r, m in ((5, 1003), (5, 19), (19, 1003)))
for dtype in floats:
    for other in (dtype, torch.float32):
        S = randlora.functional.unique_base(A[:, None].to(dtype), lam.to(other), gamma.to(other), 3.0, dtype)
        digest.update(S.view(torch.uint8).numpy().tobytes())
print(json.dumps([randlora.build_info()["cpu_capability"], digest.hexdigest()]))
"""


def test_every_instruction_set_gives_the_same_bits(tmp_path):
    order = ["portable", "avx2", "avx512"]
    hashes = set()
    for wish in order[: order.index(build_info()["cpu_capability"]) + 1]:
        used, digest = run_python(HASH_EVERYTHING, tmp_path, RANDLORA_CPU_CAPABILITY=wish)
        assert used == wish
        hashes.add(digest)
    assert len(hashes) == 1


# ---- statistics ------------------------------------------------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("kind", SPARSITIES)
def test_mean_variance_and_density(kind, device):
    bases = RandomBases(500, 400, 40, kind=kind, seed=17, dtype=torch.float64, device=device)
    for values in (bases.A, bases.B):
        count = values.numel()
        fourth_moment = 9 / 5 if kind == "dense" else bases.sparsity  # of unit-variance values
        assert abs(values.mean().item()) < 5 / math.sqrt(count)
        assert abs(values.square().mean().item() - 1) <= 5 * math.sqrt((fourth_moment - 1) / count)
        if kind == "dense":
            assert 0.999 * math.sqrt(3) < values.abs().max().item() <= math.sqrt(3) * (1 + 1e-6)
            assert values.unique().numel() > 0.99 * count
            continue
        density = 1 / bases.sparsity
        spread = 5 * math.sqrt(density * (1 - density) / count)
        assert abs((values != 0).double().mean().item() - density) <= spread
        assert abs((values > 0).double().mean().item() - density / 2) < 5 * math.sqrt(density / 2 / count)


def test_very_sparse_has_one_minus_one_over_sqrt_zeros():
    """PEFT documents 1 - 2/sqrt(D) and makes 1 - 1/sqrt(D); so do we, and say so."""
    bases = RandomBases(4096, 1024, 16, kind="very_sparse")
    zeros, count = (bases.B == 0).sum().item(), bases.B.numel()
    expected = 1 - 1 / math.sqrt(1024)
    assert abs(zeros / count - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    assert bases.A.unique().tolist() == torch.tensor([-(32**0.5), 0.0, 32**0.5]).tolist()


def test_neighbours_rows_tensors_and_seeds_are_uncorrelated():
    first, second = RandomBases(512, 256, 16, seed=1), RandomBases(512, 256, 16, seed=2)
    a, b = first.A.flatten(), first.B
    pairs = {
        "neighbouring columns": (a[:-1], a[1:]),
        "rows of A": (first.A[0].flatten(), first.A[1].flatten()),
        "rows of B": (b[0].flatten(), b[1].flatten()),
        "bases": (b[:, 0].flatten(), b[:, 1].flatten()),
        "A and B": (first.A[0, 0, :16], b[0, 0]),
        "seeds": (b.flatten(), second.B.flatten()),
    }
    for name, (u, v) in pairs.items():
        assert abs((u * v).mean().item()) < 5 / math.sqrt(u.numel()), name


# ---- errors ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "sparsity-low": (dict(sparsity=0.5), ValueError, r"sparsity must lie between 1 .* and 2\^31, got 0\.5"),
    "sparsity-high": (dict(sparsity=2.0**32), ValueError, r"sparsity must lie between 1 .*, got 4\.29"),
    "sparsity-nan": (dict(sparsity=math.nan), ValueError, r"sparsity must lie between 1 .*, got nan"),
    "stream": (dict(stream=2), ValueError, r"stream must be 0 \(A\), 1 \(B\), or 3, 4 or 5 .*, got 2"),
    "stream-after": (dict(stream=6), ValueError, "or 3, 4 or 5 .*, got 6"),
    "signs-sparsity": (dict(stream=3, sparsity=3.0), ValueError, "signs have no zeros, got sparsity 3"),
    "signs-rows": (dict(stream=4), ValueError, "a vector of signs has one element along its first axis, got size 3"),
    "two-offsets": (dict(offsets=(0, 0)), ValueError, r"offsets must be 3 integers, .*, got \[0, 0\]"),
    "A-middle-offset": (dict(offsets=(0, 1, 0)), ValueError, "one element along its middle axis, .* at offset 1"),
    "negative-offset": (dict(offsets=(0, 0, -4)), ValueError, r"offsets must not be negative, got \[0, 0, -4\]"),
    "offset-too-large": (dict(offsets=(2**31, 0, 0)), ValueError, "got offset 2147483648 and size 3 along axis 0"),
    "end-too-large": (dict(offsets=(0, 0, 2**31 - 8)), ValueError, "got offset 2147483640 and size 8 along axis 2"),
}
REFUSED_TENSORS = {
    "int32": (lambda t: t.int(), TypeError, "out must be float64, float32, bfloat16 or float16.*, got Int"),
    "dense-int8": (lambda t: t.char(), TypeError, "int8 holds ternary bases only: give a sparsity.*, got Char"),
    "matrix": (lambda t: t[0], ValueError, r"out must have 3 dimensions .*, got shape \[1, 8\]"),
    "strided": (lambda t: t.transpose(0, 2), ValueError, r"contiguous along its last axis, got strides \[1, 8, 8\]"),
    "A-middle-size": (lambda t: t.view(3, 2, 4), ValueError, "one element along its middle axis, got size 2"),
}


@on_devices
@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_of_the_op(case, device):
    arguments, error, message = REFUSED[case]
    out = torch.zeros(3, 1, 8, device=device)
    with pytest.raises(error, match=message):
        fill(out, 0, **{"stream": 0, **arguments})
    assert not out.any(), "a refused call wrote something"


@on_devices
@pytest.mark.parametrize("case", REFUSED_TENSORS)
def test_bad_tensors_of_the_op(case, device):
    change, error, message = REFUSED_TENSORS[case]
    out = change(torch.zeros(3, 1, 8, device=device))
    with pytest.raises(error, match=message):
        fill(out, 0, 0)
    assert not out.any(), "a refused call wrote something"
