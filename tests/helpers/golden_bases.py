"""The random bases from their definition alone, in numpy: shares nothing with randlora, not even an import.

Philox4x32-10 (Salmon et al., SC'11; Random123), key = the 64-bit seed. Four neighbours along the last axis share one
counter: A[k, 0, j] is lane j % 4 of (j / 4, 0, k, 0), B[o, i, k] is lane k % 4 of (k / 4, i, o, 1).

Hadamard bases, with the group width w and R = 2^ceil(log2 r): A[k, 0, j] = a_j W(k, (j // w) mod R) and
B[o, i, k] = b_o c_q W(o, q), where W(x, y) = (-1)^popcount(x & y), q = i r + k, and a, b, c are signs: the top bit (1:
minus) of lane x % 4 of (x / 4, 0, 0, stream) with x = j, o, q and stream 3, 4, 5.

Run as a script, it writes tests/data/golden_bases.json, which any other implementation can be tested with.
"""

import json
import math
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "data" / "golden_bases.json"
LOW32 = np.uint64(0xFFFFFFFF)


def philox(counter, key):
    """Four arrays of words for four arrays of counter words and two key words."""
    c0, c1, c2, c3 = (np.asarray(c, np.uint64) for c in counter)
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & LOW32,
            (p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            p0 & LOW32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words(seed, stream, offsets, shape):
    """The 32-bit words behind the slice of A (stream 0) or B (stream 1) that starts at `offsets`."""
    x0, x1, x2 = np.meshgrid(
        *(np.arange(start, start + size, dtype=np.uint64) for start, size in zip(offsets, shape, strict=True)),
        indexing="ij",
    )
    counter = (x2 // np.uint64(4), x1, x0, np.full_like(x0, stream))
    lanes = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    return np.choose((x2 % np.uint64(4)).astype(np.int64), lanes)


def dense(u):
    q = (u >> np.uint64(8)).astype(np.int64) - 2**23
    return (2 * q + 1).astype(np.float32) * np.float32(math.sqrt(3) * 2.0**-24)


def ternary(u, sparsity):
    threshold = math.floor(2**32 / (2 * sparsity))
    return (u >= np.uint64(2**32 - threshold)).astype(np.int8) - (u < np.uint64(threshold)).astype(np.int8)


def block(seed, stream, offsets, shape, sparsity=None):
    """float32 for dense bases (sparsity None), int8 for ternary ones."""
    u = words(seed, stream, offsets, shape)
    return dense(u) if sparsity is None else ternary(u, sparsity)


def of_kind(kind, seed, stream, offsets, shape, sparsity=None, r=None, width=None):
    """A slice of the stored bases of any kind; `r` and `width` are asked for by Hadamard ones."""
    if kind == "hadamard":
        return hadamard(seed, stream, offsets, shape, r, width)
    return block(seed, stream, offsets, shape, sparsity)


def signs(seed, stream, x):
    """-1 or +1 for each number in `x`, an array."""
    return 1 - 2 * (words(seed, stream, (0, 0, 0), (1, 1, x.max() + 1))[0, 0, x] >> np.uint64(31)).astype(np.int8)


def walsh(x, y):
    z, parity = x & y, 0
    while z.any():
        z, parity = z >> 1, parity ^ (z & 1)
    return (1 - 2 * parity * np.ones_like(x & y)).astype(np.int8)


def hadamard(seed, stream, offsets, shape, r, width):
    """As :func:`block`, of Hadamard bases of rank `r`: int8."""
    x0, x1, x2 = (
        np.arange(start, start + size).reshape([-1 if axis == i else 1 for i in range(3)])
        for axis, (start, size) in enumerate(zip(offsets, shape, strict=True))
    )
    if stream == 0:
        R = 1 << (r - 1).bit_length()
        return np.broadcast_to(signs(seed, 3, x2) * walsh(x0, x2 // width % R), shape).copy()
    q = x1 * r + x2
    return signs(seed, 4, x0) * signs(seed, 5, q) * walsh(x0, q)


# ---- the file --------------------------------------------------------------------------------------------------------

SEEDS = (0, 42, 2**32 + 7, 2**63 + 12345, 2**64 - 1)
SPARSITIES = {"dense": None, "sparse": 3.0, "very_sparse": math.sqrt(341), "sign": 1.0}
# stream, offsets, shape
SLICES = (
    (0, (0, 0, 0), (3, 1, 41)),
    (0, (5, 0, 3), (2, 1, 17)),
    (0, (2**31 - 3, 0, 2**31 - 10), (2, 1, 9)),
    (1, (0, 0, 0), (4, 3, 5)),
    (1, (7, 11, 2), (3, 2, 7)),
    (1, (2**31 - 3, 2**31 - 4, 2**31 - 6), (2, 3, 5)),
)


# r, width, and slices that lie inside such bases
HADAMARD = (
    (5, 4, ((0, (0, 0, 0), (5, 1, 41)), (0, (2, 0, 3), (3, 1, 17)), (1, (0, 0, 0), (9, 3, 5)))),
    (5, 2, ((0, (1, 0, 2), (2, 1, 9)), (1, (7, 2, 1), (5, 2, 3)))),
    (32, 8, ((0, (9, 0, 300), (2, 1, 41)), (1, (1000, 3, 0), (3, 1, 32)))),
    (1, 1, ((0, (0, 0, 2), (1, 1, 9)), (1, (6, 5, 0), (3, 7, 1)))),
)


def as_text(row):
    """A row of values: eight hex digits (the bits) per float32; one of - 0 + per ternary number."""
    if row.dtype == np.float32:
        return " ".join(f"{bits:08x}" for bits in row.view(np.uint32))
    return "".join("-0+"[value + 1] for value in row)


def from_text(rows):
    if set(rows[0]) <= set("-0+"):
        return np.array([["-0+".index(c) - 1 for c in row] for row in rows], np.int8)
    return np.array([[int(bits, 16) for bits in row.split()] for row in rows], np.uint32).view(np.float32)


def golden_text():
    lines = []
    for seed in SEEDS:
        for kind, sparsity in SPARSITIES.items():
            for stream, offsets, shape in SLICES:
                values = block(seed, stream, offsets, shape, sparsity)
                case = {
                    "kind": kind,
                    "sparsity": sparsity,
                    "seed": seed,
                    "tensor": "AB"[stream],
                    "offsets": offsets,
                    "shape": shape,
                    "rows": [as_text(row) for row in values.reshape(-1, shape[2])],
                }
                lines.append(json.dumps(case))
        for r, width, slices in HADAMARD:
            for stream, offsets, shape in slices:
                values = hadamard(seed, stream, offsets, shape, r, width)
                case = {
                    "kind": "hadamard",
                    "r": r,
                    "group_width": width,
                    "seed": seed,
                    "tensor": "AB"[stream],
                    "offsets": offsets,
                    "shape": shape,
                    "rows": [as_text(row) for row in values.reshape(-1, shape[2])],
                }
                lines.append(json.dumps(case))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def load_golden():
    cases = json.loads(GOLDEN.read_text())
    for case in cases:
        case["stream"] = "AB".index(case["tensor"])
        case["values"] = from_text(case["rows"]).reshape(case["shape"])
    return cases


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(golden_text())
    print(f"wrote {GOLDEN} ({GOLDEN.stat().st_size} bytes)")
