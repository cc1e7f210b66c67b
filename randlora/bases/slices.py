"""Parts of bases: the rows of B and the columns of A that a shard of a weight needs, and nothing else of them.

An element of Philox bases depends on its own indices, so that a part is generated alone. Of bases that are given as
tensors it is cut out, and PEFT's draw, which has one order, is drawn whole for it.
"""

from __future__ import annotations

import threading
import weakref

import torch
from torch import Tensor

from . import patterns
from .copies import Copies, canonical, renew_in_children
from .definition import STREAM_A, STREAM_B, Definition
from .patterns import Form
from .random_bases import RandomBases

Interval = tuple[int, int]  # begin and end
_WHOLE = (patterns.StoredSigns, patterns.StoredLists)


class Slice:
    """``A [r, 1, columns]`` and ``B [rows, num_bases, r]`` of some bases: contiguous, one copy per dtype and device."""

    def __init__(self, bases: RandomBases, rows: Interval, columns: Interval, num_bases: int) -> None:
        self.rows, self.columns, self.num_bases = rows, columns, num_bases
        self.min_dim = columns[1] - columns[0]
        self.scale = bases.scale
        self._whole = bases.to()  # their definition, without the copies that they keep
        self.copies = Copies(self)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A and B as they are stored (:attr:`scale`). Not to be written to."""
        key = dtype, canonical(device)
        found = self.copies.kept(*key)
        if found is None:
            found = self.copies.tensors(*key)
        return self.draw(*key) if found is None else found

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same, made anew."""
        (row, end), (column, stop), n, whole = self.rows, self.columns, self.num_bases, self._whole
        if whole.prng == "philox":
            A = torch.empty((whole.r, 1, stop - column), dtype=dtype, device=device)
            B = torch.empty((end - row, n, whole.r), dtype=dtype, device=device)
            return (
                Definition.fill(whole, A, STREAM_A, (0, 0, column)), Definition.fill(whole, B, STREAM_B, (row, 0, 0)),
            )  # fmt: skip
        A, B = whole.draw(dtype, device) if whole.given is None else whole.given
        A, B = A[:, :, column:stop], B[row:end, :n]
        if whole.given is None:  # drawn for this alone: a view would keep all of it
            A, B = A.clone(), B.clone()
        return A.to(device, dtype).contiguous(), B.to(device, dtype).contiguous()

    def pack(self, device: torch.device) -> tuple[Form, float] | None:
        return None


def is_cut(bases: RandomBases, device: torch.device) -> bool:
    """Whether a shard computes with a part of these bases. Not where they are signs or lists, which are used whole."""
    return bases.prng != "philox" or patterns.form_for(bases.kind, bases.sparsity, device) not in _WHOLE


def slice_of(bases: RandomBases, rows: Interval, columns: Interval, num_bases: int) -> Slice:
    """This part of `bases`, which layers with the same share of a weight have in common while the bases live."""
    key = bases.version(), rows, columns, num_bases
    with _lock:
        known = _slices.setdefault(bases, {})
        found = known.get(key)
        if found is None:
            for outdated in [other for other in known if other[0] != key[0]]:  # of tensors that were written to since
                del known[outdated]
            found = known[key] = Slice(bases, rows, columns, num_bases)
    return found


_lock = threading.Lock()
_slices: weakref.WeakKeyDictionary[RandomBases, dict[tuple, Slice]] = weakref.WeakKeyDictionary()


@renew_in_children
def _renew() -> None:
    global _lock
    _lock = threading.Lock()
