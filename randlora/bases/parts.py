"""Parts of bases: the rows of B and the columns of A that a shard of a weight needs, and nothing else of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import patterns
from .definition import STREAM_A, STREAM_B, Definition

_USED_WHOLE = (patterns.StoredSigns, patterns.StoredLists)


class Part(NamedTuple):
    """``B[row:end, :num_bases]`` and ``A[:, :, column:stop]``, in a dtype on a device."""

    row: int
    end: int
    column: int
    stop: int
    num_bases: int
    dtype: torch.dtype
    device: torch.device


def is_cut(bases: Definition, device: torch.device) -> bool:
    """Whether a shard computes with a part of these bases. Not where they are signs or lists, which are used whole."""
    return bases.prng != "philox" or patterns.form_for(bases.kind, bases.sparsity, device) not in _USED_WHOLE


def draw(bases: Definition, given: tuple[Tensor, Tensor] | None, part: Part) -> tuple[Tensor, Tensor]:
    """A ``[r, 1, columns]`` and B ``[rows, num_bases, r]`` of a part, as they are stored, contiguous.

    An element of Philox bases depends on its own indices, so that a part is generated alone. It is cut out of tensors
    that are `given`; PEFT's draw, which has one order, is drawn whole for it.
    """
    row, end, column, stop, n, dtype, device = part
    if bases.prng == "philox":
        A = torch.empty((bases.r, 1, stop - column), dtype=dtype, device=device)
        B = torch.empty((end - row, n, bases.r), dtype=dtype, device=device)
        return bases.fill(A, STREAM_A, (0, 0, column)), bases.fill(B, STREAM_B, (row, 0, 0))
    A, B = bases.draw(dtype, device) if given is None else given
    A, B = A[:, :, column:stop], B[row:end, :n]
    if given is None:  # drawn for this alone: a view would keep all of it
        A, B = A.clone(), B.clone()
    return A.to(device, dtype).contiguous(), B.to(device, dtype).contiguous()
