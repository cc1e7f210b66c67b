"""When the products of all experts are computed at once (:mod:`randlora.layers.experts_grouped`), and of how many.

A GPU's host takes 0.1 to 0.4 ms for an expert's call. Where experts have few tokens each, that is longer than the
device needs, and all of them together cost a dozen launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import planner
from ..costs.lists import Lists

# Where grouped_mm is one kernel: with others it is a loop, and waits for the device.
DEVICES, DTYPES = ("cuda",), (torch.bfloat16,)
ALIGNED = 16  # bytes, of rows: what the tensor memory accelerator takes
MOST_GROUPS = 1023
WORKSPACE = 512 << 20  # bytes, where a layer has no bound of its own
# What the host spends on one expert's call, forward and backward, in multiply-adds that the device does meanwhile:
# 0.1 and 0.3 ms (bench/NOTES-cuda.md) at the rate that planner.BALANCE has.
HOST = (40 * 10**9, 120 * 10**9)
LAUNCHES = 3  # how many times that the host spends on all experts at once


class Sizes(NamedTuple):
    """Of each expert's weight, of the bases, and of the numbers that are multiplied."""

    in_features: int
    out_features: int
    n: int
    r: int
    dtype: torch.dtype

    @property
    def m(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def B_bytes(self) -> int:
        """Of B, where it is made for the call."""
        return max(self.in_features, self.out_features) * self.n * self.r * self.dtype.itemsize

    def temporaries(self, tokens: int) -> int:
        """Bytes that an expert takes with its `tokens`: S2, its gradient, and a copy of that in the order of the op;
        the hidden numbers and their gradient; lambda and gamma in that order, and their gradients.
        """
        P = self.n * self.r
        return self.dtype.itemsize * (3 * P * self.m + 2 * tokens * P) + 8 * self.n * (self.m + self.r)


def is_suitable(device_type: str, dtype: torch.dtype, experts: int, sizes: Sequence[int]) -> bool:
    """Whether grouped_mm is one kernel for matrices of these numbers of rows and columns."""
    if device_type not in DEVICES or dtype not in DTYPES or experts > MOST_GROUPS:
        return False
    return all(size * dtype.itemsize % ALIGNED == 0 for size in sizes)


def is_taken(
    counts: Sequence[int],
    sizes: Sizes,
    device_type: str,
    form: Lists | str | None,
    need_x: bool,
    need_parameters: bool,
    workspace: int = 0,
) -> bool:
    """Whether all experts are computed at once, where nothing else is against it: it can be done, takes less time than
    a call for each expert that has tokens, and has room in `workspace` bytes (0: as much as it takes).

    Args:
        counts: tokens of each expert. form, need_x, need_parameters: as for :func:`randlora.planner.choose`.
    """
    in_features, out_features, n, r, dtype = sizes
    if not is_suitable(device_type, dtype, len(counts), (in_features, out_features, n * r)):
        return False
    if workspace and max(map(sizes.temporaries, counts)) + made(sizes, form) > workspace:
        return False
    hit = sum(1 for count in counts if count)
    if not hit:
        return False

    def totals(form: Lists | str | None) -> dict[str, tuple[int, int]]:
        """Of one expert."""
        return planner.totals_of(
            -(-sum(counts) // hit), in_features, out_features, n, r, dtype, dtype, device_type, form=form,
            need_x=need_x, need_parameters=need_parameters,
        )  # fmt: skip

    passes, by_itself, factored = 1 + (need_x or need_parameters), totals(form).values(), totals(None)["factored"]
    alone = sum(hit * max(HOST[i], min(each[i] for each in by_itself)) for i in range(passes))
    together = sum(max(LAUNCHES * HOST[i], hit * factored[i]) for i in range(passes))
    return together < alone


def made(sizes: Sizes, form: Lists | str | None) -> int:
    """Bytes of bases that are made dense for a call."""
    return 0 if form is None else sizes.B_bytes


def pieces(counts: Sequence[int], sizes: Sizes, room: int) -> list[list[int]]:
    """The experts that have tokens, in order, as many at a time as `room` bytes have place for; one at least."""
    found: list[list[int]] = []
    left = 0
    for expert, count in enumerate(counts):
        if count:
            takes = sizes.temporaries(count)
            if not found or takes > left:
                found.append([])
                left = room
            found[-1].append(expert)
            left -= takes
    return found


def room(made: int, workspace: int = 0) -> int:
    """For what :func:`pieces` counts, beside the bases that are made."""
    return (workspace or WORKSPACE) - made


def temporaries(counts: Sequence[int], sizes: Sizes, form: Lists | str | None) -> int:
    """Bytes that a step takes beside what it returns and keeps, without a bound of the layer's own."""
    bases = made(sizes, form)
    together = pieces(counts, sizes, room(bases))
    return bases + max((sum(sizes.temporaries(counts[e]) for e in piece) for piece in together), default=0)
