"""Bases in the forms in which they are stored and multiplied where they are not dense (:mod:`randlora.ops.pattern`).

With sparsity z, 1/z of the elements are not zero. Which form costs the least depends on z and on the device:

* Lists (csrc/sparse_update.h), on the CPU from z = 10 on. They take 16 bits per non-zero, less than two bits per
  element from z = 8 on, and updates are built by walking them: at z = 45 with some thousand times fewer additions than
  the dense product has.
* Planes (csrc/packed_update.h), on the CPU between 2.5 and 10: A as lists of its rows, B at two bits per element.
* Bits (the same file), on the CPU below 2.5 and on CUDA with its tensor cores always (bench/NOTES-cuda.md), where dense
  products are faster still. A and B have two bits per element, or one where nothing is zero, and are made dense for
  every call.
* Signs (csrc/hadamard.h), of Hadamard bases: one bit per row and per column.

Dense bases are kept as dense tensors, or, where :attr:`randlora.RandomBases.keep` is False, as their seed alone
(csrc/seed.h): every call makes what it needs of them.

All others are generated from the seed in blocks of int8, never through a dense float tensor.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.calls import check_pattern, fill_bases_
from ..ops.pattern import BitTensors, ListTensors, PlaneTensors, SeedTensors, SignTensors
from . import hadamard
from .definition import STREAM_A, STREAM_B, Definition

# By sparsity, on the CPU: below the first, dense products win; from the second on, lists are built from faster than
# planes.
PLANES_FROM, LISTS_FROM = 2.5, 10.0
_BLOCK = 1 << 22  # elements of B generated at a time


class Pattern(tuple[Tensor, ...]):
    """What the ops take: the tensors of one of the forms of :mod:`randlora.ops.pattern`, in their order.

    Their contents are checked here, once (ValueError, TypeError), and again by the op that gets tensors which were
    written to meanwhile. The sizes are those of the bases, which the tensors alone do not tell in every form.
    """

    r: int
    num_bases: int
    min_dim: int
    max_dim: int

    def __new__(cls, tensors: Sequence[Tensor], r: int, num_bases: int, min_dim: int, max_dim: int) -> Pattern:
        self = super().__new__(cls, tensors)
        check_pattern(list(self))
        self.r, self.num_bases, self.min_dim, self.max_dim = r, num_bases, min_dim, max_dim
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Pattern, (tuple(self), self.r, self.num_bases, self.min_dim, self.max_dim)

    def require(self, parameters: torch.Size, in_features: int, out_features: int) -> None:
        """Raises ``ValueError`` unless a layer of these sizes, of lambda's shape and features, can have these bases."""
        m, M = min(in_features, out_features), max(in_features, out_features)
        fits = len(parameters) == 2 and parameters[0] == self.r and parameters[1] <= self.num_bases
        if not fits or m > self.min_dim or self.max_dim < M:
            raise ValueError(
                f"this pattern is of bases with r = {self.r}, at most {self.num_bases} of them, for layers of up to "
                f"{self.min_dim} and {self.max_dim} features, got randlora_lambda {list(parameters)} and a "
                f"{in_features} -> {out_features} layer: take the pattern of bases that are large enough"
            )


def form_for(kind: str, sparsity: float | None, device: torch.device, keep: bool = True) -> type[Form] | None:
    """The form that bases of this kind are kept in on `device`; None: as dense tensors. `keep`: whether these are."""
    if device.type not in ("cpu", "cuda"):
        return None
    if kind == "dense" and not keep:
        return StoredSeed
    if kind == "hadamard":
        return StoredSigns
    return None if sparsity is None else form_of(sparsity, device)


def form_of(sparsity: float, device: torch.device) -> type[Form]:
    """The form that ternary bases of this sparsity have on `device`."""
    if device.type != "cpu" or sparsity < PLANES_FROM:
        return StoredBits
    return StoredLists if sparsity >= LISTS_FROM else StoredPlanes


def planes_of(sparsity: float) -> int:
    """Of bits, per element: one says all of bases that have no zeros."""
    return 1 if sparsity == 1 else 2


class StoredLists:
    """The non-zeros of one store on one device; :meth:`of` gives the part that a layer needs."""

    name = "lists"

    def __init__(self, A: Tensor, columns_of_B: Iterator[Tensor], max_dim: int) -> None:
        """`A` is int8 ``[r, m]``; `columns_of_B` yields int8 ``[max_dim, columns]`` blocks of B2, in order."""
        self.r, self.max_dim = A.shape[0], max_dim
        entries = A.t().nonzero()  # (j, k), ascending
        j, k = entries.unbind(1)
        columns, counts = torch.unique_consecutive(j, return_counts=True)
        a_starts, a_entries = _starts(counts), (2 * k + (A[k, j] < 0)).int()
        counts, indices = [], []
        for block in columns_of_B:
            flat = block.t().flatten()
            where = flat.nonzero()[:, 0]  # column by column
            lists = 2 * (where // max_dim) + (flat[where] < 0)
            counts.append(torch.bincount(lists, minlength=2 * block.shape[1]))
            rows = (where % max_dim)[lists.argsort(stable=True)]
            indices.append(rows.to(torch.int16 if max_dim <= 1 << 16 else torch.int32))
        self.tensors = ListTensors(columns.int(), a_starts, a_entries, _starts(torch.cat(counts)), torch.cat(indices))
        self._sorted_columns = columns.tolist()
        self._parts: dict[int, Pattern] = {}

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def of(self, min_dim: int) -> Pattern:
        part = self._parts.get(min_dim)
        if part is None:
            t = self.tensors
            count = bisect.bisect_left(self._sorted_columns, min_dim)  # columns of A with a non-zero
            tensors = t._replace(columns=t.columns[:count], a_starts=t.a_starts[: count + 1])
            num_bases = t.b_starts.numel() // (2 * self.r)
            part = self._parts[min_dim] = Pattern(tensors, self.r, num_bases, min_dim, self.max_dim)
        return part


class _Whole:
    """A form that layers of any size take as it is."""

    tensors: PlaneTensors | BitTensors | SignTensors | SeedTensors
    _pattern: Pattern

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors)

    def of(self, min_dim: int) -> Pattern:
        return self._pattern


class StoredPlanes(_Whole):
    """Bases of medium density on the CPU; arguments as of :class:`StoredLists`."""

    name = "planes"

    def __init__(self, A: Tensor, columns_of_B: Iterator[Tensor], max_dim: int) -> None:
        k, j = A.nonzero().unbind(1)  # ascending
        a_starts = _starts(torch.bincount(k, minlength=A.shape[0]))
        a_entries = (2 * j + (A[k, j] < 0)).int()
        self.tensors = PlaneTensors(a_starts, a_entries, torch.cat([_bits(block) for block in columns_of_B]))
        self._pattern = _whole(self.tensors, A, max_dim)


class StoredBits(_Whole):
    """Bases that are multiplied dense; arguments as of :class:`StoredLists`. `planes` is 1 where none is zero."""

    name = "bits"

    def __init__(self, A: Tensor, columns_of_B: Iterator[Tensor], max_dim: int, planes: int = 2) -> None:
        b_planes = torch.cat([_bits(block, planes) for block in columns_of_B])
        self.tensors = BitTensors(_bits(A.t(), planes), b_planes)
        self._pattern = _whole(self.tensors, A, max_dim)


class StoredSigns(_Whole):
    """The signs of Hadamard bases, a bit each."""

    name = "signs"

    def __init__(self, a: Tensor, b: Tensor, c: Tensor, width: int, r: int) -> None:
        """int8 -1 and +1: `a` [min_dim], `b` [max_dim], `c` [num_bases * r]."""
        a_bits, b_bits, c_bits = (
            _bits(F.pad(t, (0, -len(t) % 32), value=1)[:, None], 1).view(torch.int32).flatten() for t in (a, b, c)
        )
        self.tensors = SignTensors(
            a_bits, b_bits, c_bits, width=torch.empty((width, 0), dtype=torch.int8, device=a.device)
        )
        self._pattern = Pattern(self.tensors, r, len(c) // r, len(a), len(b))


class StoredSeed(_Whole):
    """Nothing but the seed of dense bases, ``0 <= seed < 2**64``."""

    name = "seed"

    def __init__(self, seed: int, r: int, num_bases: int, min_dim: int, max_dim: int, device: torch.device) -> None:
        upper, lower = divmod(seed, 1 << 32)
        self.tensors = SeedTensors(torch.empty((upper, 0, lower), dtype=torch.int8, device=device))
        self._pattern = Pattern(self.tensors, r, num_bases, min_dim, max_dim)


Form = StoredLists | StoredPlanes | StoredBits | StoredSigns | StoredSeed


def made_from_seed(
    pattern: Sequence[Tensor], M: int, m: int, n: int, r: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The leading A ``[r, 1, m]`` and B ``[M, n, r]`` of the dense bases that a pattern has the seed of."""
    seed = SeedTensors(*pattern).seed
    upper, _, lower = seed.shape
    signed = ((upper << 32 | lower) + 2**63) % 2**64 - 2**63
    A, B = (torch.empty(shape, dtype=dtype, device=seed.device) for shape in ((r, 1, m), (M, n, r)))
    fill_bases_(A, signed, STREAM_A, (0, 0, 0))
    fill_bases_(B, signed, STREAM_B, (0, 0, 0))
    return A, B


def _whole(tensors: tuple[Tensor, ...], A: Tensor, max_dim: int) -> Pattern:
    """Planes or bits, which layers of any size take as they are."""
    r, min_dim = A.shape
    return Pattern(tensors, r, tensors[-1].shape[0] // r, min_dim, max_dim)


def _bits(block: Tensor, planes: int = 2) -> Tensor:
    """int8 ``[length, columns]`` to int16 ``[columns, planes, words]``: bit o % 16 of word o / 16, for +1 and for -1.

    One plane: for -1 alone.
    """
    length, columns = block.shape
    # Made anew, as a view in another dtype needs its strides: those of an axis of size 1 are anything in a transpose.
    rows = block.new_zeros((columns, length + -length % 16))
    rows[:, :length] = block.t()
    # Eight bytes of 0 or 1 at a time: the factor moves byte i's bit to bit 56 + i, and never two to the same place.
    gather = sum(1 << 56 - 7 * i for i in range(8))
    found = [((rows == sign).view(torch.int64) * gather >> 56).to(torch.uint8) for sign in (1, -1)[-planes:]]
    return torch.stack(found, 1).view(torch.int16)


def make(bases: Definition, device: torch.device) -> Form:
    """`bases` in the form that fits them, generated on `device`."""
    M, m, n, r = bases.max_dim, bases.min_dim, bases.num_bases, bases.r
    form: Any = form_for(bases.kind, bases.sparsity, device, keep=False)
    if form is StoredSeed:
        return StoredSeed(bases.seed, r, n, m, M, device)
    if form is StoredSigns:
        assert bases.group_width is not None
        return StoredSigns(*hadamard.all_signs(bases.signed_seed, m, M, n * r, device), bases.group_width, r)
    A = bases.fill(torch.empty((r, 1, m), dtype=torch.int8, device=device), 0, (0, 0, 0))[:, 0]
    step = max(1, _BLOCK // (M * r))

    def blocks() -> Iterator[Tensor]:
        for i in range(0, n, step):
            block = torch.empty((M, min(step, n - i), r), dtype=torch.int8, device=device)
            yield bases.fill(block, 1, (0, i, 0)).flatten(1)

    if form is StoredBits:
        assert bases.sparsity is not None
        return StoredBits(A, blocks(), M, planes_of(bases.sparsity))
    made: Form = form(A, blocks(), M)
    return made


def of_tensors(A: Tensor, B: Tensor, held: bool = True) -> tuple[Form, float] | None:
    """The form of bases that exist as tensors, if they are ternary or Hadamard ones, and the scale of their product.

    PEFT stores ternary bases dense, divided by their standard deviation: -v, 0, +v, and those of adapters that were
    made here as they are. `held`: the tensors stay, so that bits would save nothing; there is no form then.
    """
    scale, density, full = 1.0, 0.0, True
    for t in (A, B):
        size, nonzero = t.abs().max(), int(t.count_nonzero())
        if not nonzero or int((t.abs() == size).sum()) != nonzero:
            return None
        scale *= float(size)
        density = nonzero / t.numel()
        full = full and density == 1
    if full and (found := hadamard.recognise(A.sign().to(torch.int8)[:, 0], B.sign().to(torch.int8).flatten(1))):
        return StoredSigns(*found, A.shape[0]), scale
    form: Any = form_of(1 / density, B.device)
    if form is StoredBits and held:
        return None
    A, columns = A.sign().to(torch.int8)[:, 0], iter([B.sign().to(torch.int8).flatten(1)])
    made = StoredBits(A, columns, B.shape[0], 1 if full else 2) if form is StoredBits else form(A, columns, B.shape[0])
    return made, scale


def _starts(counts: Tensor) -> Tensor:
    return torch.cat((counts.new_zeros(1), counts.cumsum(0))).int()
