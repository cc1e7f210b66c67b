"""RandomBases as an object: values for any seed, growth, fingerprints, errors."""

import hashlib
import json
import math

import pytest
import torch
from helpers import golden_bases
from helpers.common import FLOATS, KINDS, normal, on_devices, over

from randlora import RandomBases

CPU = torch.device("cpu")
SPARSITY = {"dense": None, "sparse": 3.0, "very_sparse": math.sqrt(41), "sign": 1.0, "hadamard": None}


# ---- values ----


@on_devices
@over("dtype", FLOATS)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_every_seed(kind, dtype, device):
    for seed in (0, 2**32 + 7, 2**63 + 12345, 2**64 - 1):
        bases = RandomBases(64, 41, 5, kind=kind, seed=seed, dtype=dtype, device=device)
        stored = bases.tensors()
        shapes = ((5, 1, 41), (64, 9, 5))  # 9 = ceil(41 / 5)
        for stream, (got, shown, shape) in enumerate(zip(stored, (bases.A, bases.B), shapes, strict=True)):
            values = golden_bases.of_kind(kind, seed, stream, (0, 0, 0), shape, SPARSITY[kind], 5, bases.group_width)
            values = torch.from_numpy(values).to(dtype)
            assert got.dtype == dtype and got.device.type == device and torch.equal(got.cpu(), values)
            factor = math.sqrt(SPARSITY[kind] or 1)
            assert torch.equal(shown.cpu(), values * factor)
        assert bases.scale == (SPARSITY[kind] or 1)


def test_a_rank_contains_the_smaller_rank():
    """Rows of A and columns of B depend on their indices only, not on r."""
    small, large = RandomBases(64, 41, 5, num_bases=3), RandomBases(99, 77, 8)
    assert torch.equal(large.A[:5, :, :41], small.A)
    assert torch.equal(large.B[:64, :3, :5], small.B)


@pytest.mark.parametrize("kind", KINDS)
def test_growth_keeps_values(kind):
    bases = RandomBases(50, 30, 4, kind=kind, seed=3)
    A, B = bases.tensors()
    sparsity, width = bases.sparsity, bases.group_width
    bases.require(20, 10, 2)
    assert bases.tensors()[0] is A, "what is large enough stays"
    for wanted in ((120, 30, 8), (120, 81, 8), (120, 81, 21)):
        bases.require(*wanted)
        assert (bases.max_dim, bases.min_dim, bases.num_bases) == wanted
        assert (bases.sparsity, bases.group_width) == (sparsity, width)
        larger_A, larger_B = bases.tensors()
        assert larger_A.shape == (4, 1, wanted[1]) and larger_B.shape == (wanted[0], wanted[2], 4)
        assert torch.equal(larger_A[:, :, :30], A) and torch.equal(larger_B[:50, :8], B)


def test_one_copy_per_dtype_and_nbytes_counts_them():
    bases = RandomBases(64, 41, 5)
    elements = 5 * 41 + 64 * 9 * 5
    assert bases.nbytes == 0, "nothing is generated before it is used"
    assert bases.tensors()[0] is bases.tensors(torch.float32, CPU)[0] is bases.A
    assert bases.nbytes == 4 * elements
    bases.tensors(torch.bfloat16)
    assert bases.nbytes == 6 * elements
    other = bases.to(torch.float64)
    assert other.dtype == torch.float64 and bases.dtype == torch.float32 and other.nbytes == 0
    assert other.B.dtype == torch.float64 and torch.equal(other.B.float(), bases.B)
    assert other.nbytes == 8 * elements and bases.nbytes == 6 * elements


def test_default_dtype_is_torchs():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert RandomBases(4, 4, 2).A.dtype == torch.float64
    finally:
        torch.set_default_dtype(before)


# ---- fingerprints ----

PINNED = {
    "dense": "7ff1e5be9875c0194ab43a667e4c5646ff8d02f80e861804f4ddd2c5472fb618",
    "sparse": "6dd5acf4dd0271385a55a7d780141da1d1d601c0c28ec9f6fe77ec63e7042f1b",
    "hadamard": "e314a0cbff9eeb3ead0bb75071fbf9fd4c15145b867cf2e3ead35cac9d9a7cb8",
}


@on_devices
@pytest.mark.parametrize("kind", PINNED)
def test_pinned_fingerprints(kind, device):
    """Literal, and made once more from the definition in numpy: files depend on them."""
    definition = {
        "randlora_bases": 1,
        "prng": "philox",
        "seed": 7,
        "sparsity": SPARSITY[kind],
        "values": {"dense": "float32", "hadamard": "hadamard"}.get(kind, "ternary"),
        "A": [5, 1, 41],
        "B": [64, 9, 5],
    }
    if kind == "hadamard":
        definition["group_width"] = 8
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode())
    for stream, shape in enumerate(((5, 1, 41), (64, 9, 5))):
        digest.update(golden_bases.of_kind(kind, 7, stream, (0, 0, 0), shape, SPARSITY[kind], 5, 8).tobytes())
    assert digest.hexdigest() == PINNED[kind]
    assert RandomBases(64, 41, 5, kind=kind, seed=7, device=device).fingerprint() == PINNED[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_depends_on_what_defines_the_values(kind):
    def new(**changes):
        arguments = dict(max_dim=64, min_dim=41, r=5, kind=kind, seed=7, num_bases=9) | changes
        return RandomBases(**arguments)

    own = new().fingerprint()
    assert new(dtype=torch.bfloat16).fingerprint() == own
    grown = new()
    grown.require(100, 80, 20)
    assert grown.fingerprint() != own and grown.fingerprint(64, 41, 9) == own
    changed = [new(seed=8), new(r=4), new(max_dim=65), new(min_dim=42), new(num_bases=8)]
    changed += [new(kind=other) for other in KINDS if other != kind]
    if kind == "hadamard":
        changed += [new(group_width=width) for width in (4, 2, 1)]
    hashes = {bases.fingerprint() for bases in changed}
    assert len(hashes) == len(changed) and own not in hashes


def test_fingerprint_of_large_bases_is_that_of_their_bytes():
    """More than one block of both tensors."""
    bases = RandomBases(3000, 600, 64, seed=1)
    expected = hashlib.sha256(
        json.dumps(
            {"randlora_bases": 1, "prng": "philox", "seed": 1, "sparsity": None, "values": "float32",
             "A": [64, 1, 600], "B": [3000, 10, 64]},
            sort_keys=True,
        ).encode()
    )  # fmt: skip
    for tensor in bases.tensors():
        expected.update(tensor.numpy().tobytes())
    assert bases.fingerprint() == expected.hexdigest()


# ---- errors ----

BAD = {
    "r": (dict(r=0), ValueError, "r must be at least 1, got 0"),
    "r-float": (dict(r=2.0), TypeError, r"r must be an integer, got 2\.0 \(float\)"),
    "r-bool": (dict(r=True), TypeError, r"r must be an integer, got True \(bool\)"),
    "min_dim": (dict(min_dim=0), ValueError, "min_dim must be at least 1, got 0"),
    "dims": (dict(min_dim=65), ValueError, "max_dim must be at least min_dim = 65, got 64"),
    "num_bases": (dict(num_bases=-1), ValueError, "num_bases must be at least 1, got -1"),
    "kind": (
        dict(kind="gauss"),
        ValueError,
        "kind must be one of dense, hadamard, .*, sign, got 'gauss'",
    ),
    "prng": (dict(prng="mt"), ValueError, "prng must be one of philox, peft, peft-fp16, got 'mt'"),
    "seed-low": (dict(seed=-1), ValueError, "seed must be between 0 and 18446744073709551615, got -1"),
    "seed-high": (dict(seed=2**64), ValueError, "seed must be between 0 and .*, got 18446744073709551616"),
    "dtype": (dict(dtype=torch.int8), TypeError, "dtype must be one of torch.float64, .*, got torch.int8"),
    "peft-sign": (dict(prng="peft", kind="sign"), ValueError, "prng='peft' has the kinds .* got kind='sign'"),
    "peft-hadamard": (dict(prng="peft", kind="hadamard"), ValueError, "prng='peft' has the kinds .* kind='hadamard'"),
    "dense-width": (dict(group_width=2), ValueError, "kind='dense' has no group width, got group_width=2"),
    "width": (dict(kind="hadamard", group_width=3), ValueError, "group_width must be 8, 4, 2 or 1, got 3"),
    "width-bool": (dict(kind="hadamard", group_width=True), ValueError, "group_width must be .*, got True"),
    "hadamard-sparsity": (dict(kind="hadamard", sparsity=2.0), ValueError, "kind='hadamard' has no free sparsity"),
    "dense-sparsity": (dict(sparsity=2.0), ValueError, r"kind='dense' has no free sparsity, got sparsity=2\.0"),
    "sparsity": (dict(kind="sparse", sparsity=0.5), ValueError, r"sparsity must be at least 1 .*, got 0\.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    change, error, message = BAD[case]
    with pytest.raises(error, match=message):
        RandomBases(**(dict(max_dim=64, min_dim=41, r=5) | change))


BAD_TENSORS = {
    "list": (([1.0], normal(9, 9, 5)), TypeError, r"randlora_A must be a tensor of shape \[r, 1, min_dim\], got list"),
    "dtype": ((normal(5, 1, 41), torch.ones(64, 9, 5).int()), TypeError, "randlora_B's dtype .*, got torch.int32"),
    "rank": ((normal(5, 41), normal(64, 9, 5)), ValueError, r"randlora_A must have shape .*, got \[5, 41\]"),
    "dtypes": ((normal(5, 1, 41), normal(64, 9, 5).double()), ValueError, "share dtype .* torch.float32 .*float64"),
    "r": ((normal(5, 1, 41), normal(64, 9, 4)), ValueError, r"agree in r, got \[5, 1, 41\] and \[64, 9, 4\]"),
    "middle": ((normal(5, 2, 41), normal(64, 9, 5)), ValueError, r"got \[5, 2, 41\]"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_given_tensors(case):
    tensors, error, message = BAD_TENSORS[case]
    with pytest.raises(error, match=message):
        RandomBases.from_tensors(*tensors)


def test_fixed_bases_do_not_grow():
    for bases in (RandomBases(64, 41, 5, prng="peft"), RandomBases.from_tensors(normal(5, 1, 41), normal(64, 9, 5))):
        with pytest.raises(ValueError, match=r"fixed size .* needed .*\[5, 1, 42\] .*\[64, 9, 5\], got \[5, 1, 41\]"):
            bases.require(64, 42, 9)
        assert bases.min_dim == 41


@pytest.mark.parametrize(
    "dims, message",
    [
        ((65, None, None), "max_dim must be between 1 and 64, got 65"),
        ((None, -1, None), "min_dim must be between 1 and 41, got -1"),
        ((None, None, 0), "num_bases must be between 1 and 9, got 0"),
    ],
    ids=["more", "negative", "zero"],
)
def test_fingerprint_of_what_is_not_there(dims, message):
    with pytest.raises(ValueError, match=message):
        RandomBases(64, 41, 5).fingerprint(*dims)
