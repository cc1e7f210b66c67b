"""Hadamard bases: entries of the Sylvester-Hadamard matrices ``W(x, y) = (-1)^popcount(x & y)`` with random signs.

    A[k, 0, j] = a_j W(k, (j // w) mod R)          B[o, i, k] = b_o c_q W(o, q)          q = i r + k, R = 2^ceil(log2 r)

a, b and c are signs from Philox (csrc/bases.h). The group width w is part of the definition: columns of A with the same
``(j // w) mod R``, a group, are equal but for their signs, and n bases tell at most n of them apart. So a group with
more columns than that costs rank, and a store is made with the largest width by which no layer's groups have.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .random_bases import RandomBases

WIDTHS = (8, 4, 2, 1)
SIGNS_A, SIGNS_B, SIGNS_C = 3, 4, 5  # streams of fill_bases_
_BLOCK = 1 << 19  # elements of B made at a time


def groups(r: int) -> int:
    """R: of how many groups of columns A consists, or would if it were wide enough."""
    return 1 << (r - 1).bit_length()


def group_width(layers: Iterable[tuple[int, int]], r: int) -> int:
    """The largest width at which groups have no more columns than there are bases, for layers ``(m, n)``; at least 1.

    `m` is the smaller dimension of a layer, `n` its number of bases.
    """
    layers, R = set(layers), groups(r)
    return next(w for w in WIDTHS if w == 1 or all(w * -(-m // (w * R)) <= n for m, n in layers))


def lost_rank(m: int, n: int, r: int, width: int) -> int:
    """By how much the rank of an update stays below ``min(m, n r)``, as groups have more columns than bases."""
    R = groups(r)
    rounds, rest = divmod(m, width * R)
    wider, part = divmod(rest, width)  # groups with a whole round more, and the columns of one that is begun
    sizes = ((width * (rounds + 1), wider), (width * rounds + part, 1), (width * rounds, R - wider - 1))
    return max(0, min(m, n * r) - sum(count * min(n, size) for size, count in sizes))


def signs(bases: RandomBases, stream: int, first: int, count: int, device: torch.device) -> Tensor:
    """int8 ``[count]``, -1 or +1: the signs of one stream from `first` on."""
    out = torch.empty((1, 1, count), dtype=torch.int8, device=device)
    torch.ops.randlora.fill_bases_(out, bases.signed_seed, stream, (0, 0, first))
    return out[0, 0]


def all_signs(bases: RandomBases, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and c of a whole store."""
    return (
        signs(bases, SIGNS_A, 0, bases.min_dim, device),
        signs(bases, SIGNS_B, 0, bases.max_dim, device),
        signs(bases, SIGNS_C, 0, bases.num_bases * bases.r, device),
    )


def fill(bases: RandomBases, out: Tensor, stream: int, offsets: tuple[int, int, int]) -> None:
    """Writes the slice of A (stream 0) or B (stream 1) that starts at `offsets` into `out`, as ``fill_bases_`` does."""
    rows, middle, columns = out.shape
    first, base, start = offsets
    x = torch.arange(first, first + rows, device=out.device)
    if stream == 0:
        group = torch.arange(start, start + columns, device=out.device) // bases.group_width % groups(bases.r)
        out[:, 0] = _walsh(x, groups(bases.r))[:, group] * signs(bases, SIGNS_A, start, columns, out.device)
        return
    begin, end = base * bases.r, (base + middle) * bases.r
    b, c = signs(bases, SIGNS_B, first, rows, out.device), signs(bases, SIGNS_C, begin, end - begin, out.device)
    step = max(1, _BLOCK // end)
    for row in range(0, rows, step):
        block = slice(row, row + step)
        values = _walsh(x[block], end)[:, begin:] * b[block, None] * c
        out[block] = values.view(-1, middle, bases.r)[:, :, start : start + columns]


def recognise(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """a, b, c and the group width by which int8 ``A [r, m]`` and ``B [M, n r]`` of -1 and +1 are Hadamard bases."""
    (r, m), (M, P), at = A.shape, B.shape, A.device
    a, b, c = A[0], B[:, 0], B[0] * B[0, 0]
    if not torch.equal(_walsh(torch.arange(M, device=at), P) * b[:, None] * c, B):
        return None
    rows = _walsh(torch.arange(r, device=at), groups(r))
    for width in WIDTHS:
        group = torch.arange(m, device=at) // width % groups(r)
        if torch.equal(rows[:, group] * a, A):
            return a, b, c, width
    return None


def _walsh(x: Tensor, columns: int) -> Tensor:
    """W(x, y) for all y below `columns`, int8."""
    found = torch.ones((len(x), 1), dtype=torch.int8, device=x.device)
    while found.shape[1] < columns:
        bit = found.shape[1]
        found = torch.cat((found, found * torch.where(x & bit != 0, -1, 1).to(torch.int8)[:, None]), 1)
    return found[:, :columns].contiguous()
