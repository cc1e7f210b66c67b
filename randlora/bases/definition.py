"""What defines random bases: a few numbers, from which any part of A and B can be made at any time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import require_float, require_int, require_size
from ..ops.calls import fill_bases_
from . import hadamard, peft_prng

KINDS = ("dense", "hadamard", "sparse", "very_sparse", "sign")
PEFT_KINDS = ("dense", "sparse", "very_sparse")
PRNGS = ("philox", "peft", "peft-fp16")

STREAM_A, STREAM_B = 0, 1


class Definition:
    """Sizes, kind, seed and generator of bases ``A [r, 1, min_dim]`` and ``B [max_dim, num_bases, r]``.

    Arguments as for :class:`randlora.RandomBases`. With ``prng="philox"`` an element depends on its own indices and the
    seed only, so that any slice can be made alone.
    """

    def __init__(
        self,
        max_dim: int,
        min_dim: int,
        r: int,
        kind: str,
        seed: int,
        num_bases: int | None,
        prng: str,
        sparsity: float | None,
        group_width: int | None,
    ) -> None:
        self.r = require_size("r", r)
        self.min_dim = require_size("min_dim", min_dim, 2**31 - 1)
        self.max_dim = require_size("max_dim", max_dim, 2**31 - 1)
        if self.max_dim < self.min_dim:
            raise ValueError(f"max_dim must be at least min_dim = {min_dim}, got {max_dim}")
        default = bases_for_full_rank(self.min_dim, self.r)
        self.num_bases = default if num_bases is None else require_size("num_bases", num_bases, 2**31 - 1)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        if prng not in PRNGS:
            raise ValueError(f"prng must be one of {', '.join(PRNGS)}, got {prng!r}")
        if prng != "philox" and (kind not in PEFT_KINDS or sparsity is not None):
            raise ValueError(
                f"prng={prng!r} has the kinds dense, sparse and very_sparse with PEFT's own sparsity, "
                f"got kind={kind!r}, sparsity={sparsity}"
            )
        self.kind, self.prng = kind, prng
        self.seed = require_int("seed", seed, 0, 2**64 - 1)
        self.sparsity = sparsity_of(kind, self.min_dim, sparsity)
        self.group_width = group_width_of(kind, group_width)
        if kind == "hadamard" and group_width is None:
            self.group_width = hadamard.group_width([(self.min_dim, self.num_bases)], self.r)

    @property
    def scale(self) -> float:
        """The factor that a product of the stored A and B lacks: z for ternary bases, stored as -1, 0, +1; else 1."""
        return 1.0 if self.sparsity is None or self.prng != "philox" else self.sparsity

    @property
    def signed_seed(self) -> int:
        """The seed as ops take it: their schemas carry signed 64-bit integers."""
        return self.seed - 2**64 if self.seed >= 2**63 else self.seed

    def fill(self, out: Tensor, stream: int, offsets: tuple[int, int, int]) -> Tensor:
        """The slice of the stored A (stream 0) or B (stream 1) that begins at `offsets` and has the shape of `out`."""
        if out.is_meta:  # a model without numbers still has shapes to compute
            return out
        if self.kind == "hadamard":
            assert self.group_width is not None
            hadamard.fill(out, self.signed_seed, self.r, self.group_width, stream, offsets)
        else:
            fill_bases_(out, self.signed_seed, stream, offsets, self.sparsity)
        return out

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """The stored A and B, made anew (see :attr:`scale`)."""
        if self.prng != "philox":
            half = torch.bfloat16 if self.prng == "peft" else torch.float16
            A, B = peft_prng.draw(self.max_dim, self.min_dim, self.num_bases, self.r, self.seed, self.sparsity, half)
            return A.to(device=device, dtype=dtype), B.to(device=device, dtype=dtype)
        A = torch.empty((self.r, 1, self.min_dim), dtype=dtype, device=device)
        B = torch.empty((self.max_dim, self.num_bases, self.r), dtype=dtype, device=device)
        return self.fill(A, STREAM_A, (0, 0, 0)), self.fill(B, STREAM_B, (0, 0, 0))


def bases_for_full_rank(min_dim: int, r: int) -> int:
    """``ceil(min_dim / r)``: how many bases of rank r a layer with this smaller dimension takes by default."""
    return -(-min_dim // r)


def sparsity_of(kind: str, min_dim: int, sparsity: float | None) -> float | None:
    """z of bases of this kind, None for kinds without zeros to draw; ``ValueError`` if they cannot have `sparsity`."""
    if sparsity is None:
        return {"sign": 1.0, "sparse": 3.0, "very_sparse": math.sqrt(min_dim)}.get(kind)
    if kind not in ("sparse", "very_sparse"):
        raise ValueError(f"kind={kind!r} has no free sparsity, got sparsity={sparsity}")
    return require_float("sparsity", sparsity, 1.0, 2.0**31)


def group_width_of(kind: str, group_width: int | None) -> int | None:
    """`group_width`, or ``ValueError`` if bases of this kind cannot have it. None: left open."""
    if group_width is None:
        return None
    if kind != "hadamard":
        raise ValueError(f"kind={kind!r} has no group width, got group_width={group_width}")
    if isinstance(group_width, bool) or group_width not in hadamard.WIDTHS:
        raise ValueError(f"group_width must be 8, 4, 2 or 1, got {group_width!r}")
    return int(group_width)
