"""The forms in which the ops take bases that are not dense tensors, by the names that csrc/pattern.h gives them.

A pattern is a sequence of tensors, and their number says which form it has: lists of what is not zero
(csrc/sparse_update.h), planes or bits of ternary bases (csrc/packed_update.h), the signs of Hadamard bases
(csrc/hadamard.h), or the seed of dense ones, which are made for every call (csrc/seed.h).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class ListTensors(NamedTuple):
    columns: Tensor
    a_starts: Tensor
    a_entries: Tensor
    b_starts: Tensor
    b_indices: Tensor


class PlaneTensors(NamedTuple):
    a_starts: Tensor
    a_entries: Tensor
    b_planes: Tensor


class BitTensors(NamedTuple):
    a_planes: Tensor
    b_planes: Tensor


class SignTensors(NamedTuple):
    a: Tensor
    b: Tensor
    c: Tensor
    width: Tensor  # empty, [group_width, 0]: its shape says all


class SeedTensors(NamedTuple):
    seed: Tensor  # empty, [upper 32 bits, 0, lower 32 bits]: its shape says all


FORMS = {len(form._fields): form for form in (ListTensors, PlaneTensors, BitTensors, SignTensors, SeedTensors)}


def is_lists(pattern: Sequence[Tensor]) -> bool:
    """Whether it says what is not zero, by lists; their updates have only those of the m rows that are not zero."""
    return len(pattern) == len(ListTensors._fields)


def is_planes(pattern: Sequence[Tensor]) -> bool:
    """Whether it has lists of A and two bits per element of B."""
    return len(pattern) == len(PlaneTensors._fields)


def is_bits(pattern: Sequence[Tensor]) -> bool:
    """Whether it has one or two bits per element of A and B, which are made dense for every call."""
    return len(pattern) == len(BitTensors._fields)


def is_packed(pattern: Sequence[Tensor]) -> bool:
    """Whether it is planes or bits."""
    return is_planes(pattern) or is_bits(pattern)


def is_signs(pattern: Sequence[Tensor]) -> bool:
    """Whether it is the signs of Hadamard bases."""
    return len(pattern) == len(SignTensors._fields)


def is_seed(pattern: Sequence[Tensor]) -> bool:
    """Whether it is the seed of dense bases that nobody keeps."""
    return len(pattern) == len(SeedTensors._fields)


def require_form(pattern: Sequence[Tensor]) -> None:
    """Raises ``ValueError`` unless the number of tensors is that of a form, or 0: dense bases."""
    if len(pattern) != 0 and len(pattern) not in FORMS:
        raise ValueError(
            "pattern must be 5 lists, 4 tensors of Hadamard bases, 3 or 2 of packed ones, or 1 seed, got "
            f"{len(pattern)}"
        )
