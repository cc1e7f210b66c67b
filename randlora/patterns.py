"""Ternary bases in the forms that are stored and multiplied: index lists, or two bits per element.

Lists (csrc/sparse_update.h): at density 1/z an entry of 16 bits per non-zero takes less room than two bits per element
from z = 8 on, and from about 10 on the update is built faster by walking the lists: at z = 45 with some thousand times
fewer additions than the dense product has. Planes (csrc/packed_update.h): below that, A as lists of its rows and B at
two bits per element. Both are generated from the seed in blocks of int8, never through a dense float tensor.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .bases import RandomBases

# By sparsity: below the first, dense products win; from the second on, lists are built from faster than bits.
PLANES_FROM, LISTS_FROM = 2.5, 10.0
_BLOCK = 1 << 22  # elements of B generated at a time

# What the ops take. Lists: columns, a_starts, a_entries, b_starts, b_indices. Planes: a_starts, a_entries, b_planes.
Pattern = tuple[Tensor, ...]


def is_planes(pattern: Sequence[Tensor]) -> bool:
    """Whether a pattern is one of planes, not of lists (csrc/packed_update.h: ``is_packed``)."""
    return len(pattern) == 3


def wanted(sparsity: float | None, device: torch.device) -> bool:
    """Whether bases of this sparsity are kept as lists or planes on `device`.

    ``sign`` bases have no zeros to leave out. CUDA keeps those of medium density dense, for its tensor cores.
    """
    return sparsity is not None and (sparsity >= LISTS_FROM or (sparsity >= PLANES_FROM and device.type == "cpu"))


class Lists:
    """The non-zeros of one store on one device; :meth:`of` gives the part that a layer needs."""

    def __init__(self, A: Tensor, columns_of_B: Iterator[Tensor], max_dim: int) -> None:
        """`A` is int8 ``[r, m]``; `columns_of_B` yields int8 ``[max_dim, columns]`` blocks of B2, in order."""
        entries = A.t().nonzero()  # (j, k), ascending
        j, k = entries.unbind(1)
        columns, counts = torch.unique_consecutive(j, return_counts=True)
        self.columns, self.a_starts = columns.int(), _starts(counts)
        self.a_entries = (2 * k + (A[k, j] < 0)).int()
        counts, indices = [], []
        for block in columns_of_B:
            signs = torch.stack((block == 1, block == -1), 2).flatten(1)  # [max_dim, 2 p + (negative)]
            where = signs.t().nonzero()
            counts.append(signs.sum(0))
            indices.append(where[:, 1].to(torch.int16 if max_dim <= 1 << 16 else torch.int32))
        self.b_starts, self.b_indices = _starts(torch.cat(counts)), torch.cat(indices)
        self._sorted_columns = columns.tolist()
        self._parts: dict[int, Pattern] = {}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.columns, self.a_starts, self.a_entries, self.b_starts, self.b_indices))

    def of(self, min_dim: int) -> Pattern:
        part = self._parts.get(min_dim)
        if part is None:
            count = bisect.bisect_left(self._sorted_columns, min_dim)  # columns of A with a non-zero
            part = self._parts[min_dim] = (
                self.columns[:count], self.a_starts[: count + 1], self.a_entries, self.b_starts, self.b_indices
            )  # fmt: skip
        return part


class Planes:
    """Bases of medium density on one device, as :class:`Lists`."""

    def __init__(self, A: Tensor, columns_of_B: Iterator[Tensor], max_dim: int) -> None:
        k, j = A.nonzero().unbind(1)  # ascending
        self.a_starts = _starts(torch.bincount(k, minlength=A.shape[0]))
        self.a_entries = (2 * j + (A[k, j] < 0)).int()
        self.b_planes = torch.cat([_bits(block) for block in columns_of_B])

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.a_starts, self.a_entries, self.b_planes))

    def of(self, min_dim: int) -> Pattern:
        return self.a_starts, self.a_entries, self.b_planes


def _bits(block: Tensor) -> Tensor:
    """int8 ``[max_dim, columns]`` to int16 ``[columns, 2, words]``: bit o % 16 of word o / 16, for +1 and for -1."""
    rows = torch.nn.functional.pad(block.t(), (0, -block.shape[0] % 16)).unflatten(1, (-1, 16))
    weights = torch.tensor([1 << bit for bit in range(15)] + [-(1 << 15)], dtype=torch.int16, device=block.device)
    return torch.stack([((rows == sign) * weights).sum(2, dtype=torch.int16) for sign in (1, -1)], 1)


def make(bases: RandomBases, device: torch.device) -> Lists | Planes:
    """`bases` in the form that fits their sparsity, generated on `device`."""
    M, m, n, r = bases.max_dim, bases.min_dim, bases.num_bases, bases.r
    A = bases.fill(torch.empty((r, 1, m), dtype=torch.int8, device=device), 0, (0, 0, 0))[:, 0]
    step = max(1, _BLOCK // (M * r))

    def blocks():
        for i in range(0, n, step):
            block = torch.empty((M, min(step, n - i), r), dtype=torch.int8, device=device)
            yield bases.fill(block, 1, (0, i, 0)).flatten(1)

    return (Lists if bases.sparsity >= LISTS_FROM else Planes)(A, blocks(), M)


def of_tensors(A: Tensor, B: Tensor) -> tuple[Lists | Planes, float] | None:
    """The form of bases that exist as tensors, if they are ternary, and the scale of their product.

    PEFT stores ternary bases dense, divided by their standard deviation: -v, 0, +v.
    """
    scale, density = 1.0, 0.0
    for t in (A, B):
        size, nonzero = t.abs().max(), int(t.count_nonzero())
        if not nonzero or int((t.abs() == size).sum()) != nonzero:
            return None
        scale *= float(size)
        density = nonzero / t.numel()
    if not wanted(1 / density, B.device):
        return None
    signs = [t.sign().to(torch.int8) for t in (A, B)]
    form = Lists if density * LISTS_FROM <= 1 else Planes
    return form(signs[0][:, 0], iter([signs[1].flatten(1)]), B.shape[0]), scale


def _starts(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
