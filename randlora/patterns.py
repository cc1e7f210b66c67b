"""Very sparse ternary bases as index lists: what is non-zero, and where (csrc/sparse_update.h reads it).

At density 1/z a list entry of 16 bits per non-zero takes less room than two bits per element from z = 8 on, and the
update is then built by walking the lists, some thousand times fewer additions than the dense product has. Lists are
generated from the seed in blocks of int8, never through a dense float tensor.
"""

from __future__ import annotations

import bisect
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .bases import RandomBases

# From this sparsity on, bases are kept as lists and never expanded.
FROM_SPARSITY = 8.0
_BLOCK = 1 << 22  # elements of B generated at a time

Pattern = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Lists:
    """The non-zeros of one store on one device; :meth:`of` gives the part that a layer needs."""

    def __init__(self, A: Tensor, columns_of_B, max_dim: int) -> None:
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

    def count(self, min_dim: int) -> int:
        """How many of the first `min_dim` columns of A have a non-zero."""
        return bisect.bisect_left(self._sorted_columns, min_dim)

    def of(self, min_dim: int) -> Pattern:
        part = self._parts.get(min_dim)
        if part is None:
            count = self.count(min_dim)
            part = self._parts[min_dim] = (
                self.columns[:count], self.a_starts[: count + 1], self.a_entries, self.b_starts, self.b_indices
            )  # fmt: skip
        return part


def make(bases: RandomBases, device: torch.device) -> Lists:
    """The lists of `bases`, generated on `device`."""
    M, m, n, r = bases.max_dim, bases.min_dim, bases.num_bases, bases.r
    A = bases.fill(torch.empty((r, 1, m), dtype=torch.int8, device=device), 0, (0, 0, 0))[:, 0]
    step = max(1, _BLOCK // (M * r))

    def blocks():
        for i in range(0, n, step):
            block = torch.empty((M, min(step, n - i), r), dtype=torch.int8, device=device)
            yield bases.fill(block, 1, (0, i, 0)).flatten(1)

    return Lists(A, blocks(), M)


def of_tensors(A: Tensor, B: Tensor) -> tuple[Lists, float] | None:
    """The lists of bases that exist as tensors, if they are ternary and very sparse, and the scale of their product.

    PEFT stores ternary bases dense, divided by their standard deviation: -v, 0, +v.
    """
    scale = 1.0
    for t in (A, B):
        size = t.abs().max()
        nonzero = int(t.count_nonzero())
        if nonzero * FROM_SPARSITY > t.numel() or not nonzero or int((t.abs() == size).sum()) != nonzero:
            return None
        scale *= float(size)
    signs = [t.sign().to(torch.int8) for t in (A, B)]
    return Lists(signs[0][:, 0], iter([signs[1].flatten(1)]), B.shape[0]), scale


def _starts(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
