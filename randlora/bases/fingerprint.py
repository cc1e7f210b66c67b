"""What identifies a store of bases: a hash that travels with a checkpoint and proves that its bases were made again."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .random_bases import RandomBases

_BLOCK = 1 << 20  # elements generated at a time: hashing never needs a second copy of the bases


def sha256(bases: RandomBases, max_dim: int, min_dim: int, num_bases: int) -> str:
    """SHA-256 (hex) of the definition and the canonical bytes of the leading part of `bases` with these dimensions.

    Canonical bytes: float32, or int8 for bases of -1, 0 and +1; little endian, C order, A before B. Philox values are
    generated anew on the store's device, so that the hash vouches for the generator that the layers use.
    """
    digest = hashlib.sha256(json.dumps(_definition(bases, max_dim, min_dim, num_bases), sort_keys=True).encode())
    for block in _blocks(bases, max_dim, min_dim, num_bases):
        block = block.contiguous().cpu()
        digest.update((ctypes.c_char * block.nbytes).from_address(block.data_ptr()))
    return digest.hexdigest()


def sha256_of(A: Tensor, B: Tensor, bases: RandomBases, max_dim: int, min_dim: int, num_bases: int) -> str | None:
    """The hash as :func:`sha256` makes it of `bases`, but of the values `A` and `B`, in unit variance, on any device.

    None where they cannot be those of `bases`.
    """
    digest = hashlib.sha256(json.dumps(_definition(bases, max_dim, min_dim, num_bases), sort_keys=True).encode())
    for values in (A[:, :, :min_dim], B[:max_dim, :num_bases]):
        if _whole(bases):
            signs = values.sign()
            if not torch.equal(signs * math.sqrt(bases.scale), values):
                return None
            values = signs.to(torch.int8)
        values = values.to("cpu", torch.int8 if _whole(bases) else torch.float32).contiguous()
        digest.update((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
    return digest.hexdigest()


def _whole(bases: RandomBases) -> bool:
    """Whether the values are -1, 0 and +1."""
    return bases.prng == "philox" and bases.kind != "dense"


def _definition(bases: RandomBases, max_dim: int, min_dim: int, num_bases: int) -> dict:
    own = {"values": "hadamard", "group_width": bases.group_width} if bases.kind == "hadamard" else {}
    return {
        "randlora_bases": 1,
        "prng": bases.prng,
        "seed": bases.seed,
        "sparsity": bases.sparsity,
        "values": "ternary" if _whole(bases) else "float32",
        "A": [bases.r, 1, min_dim],
        "B": [max_dim, num_bases, bases.r],
        **own,
    }


def _blocks(bases: RandomBases, max_dim: int, min_dim: int, num_bases: int) -> Iterator[Tensor]:
    if bases.prng != "philox":
        A, B = bases.draw(torch.float32, torch.device("cpu"))
        yield A[:, :, :min_dim]
        yield B[:max_dim, :num_bases]
        return
    dtype = torch.int8 if _whole(bases) else torch.float32
    device = torch.device("cpu") if bases.device.type == "meta" else bases.device
    for stream, (rows, middle, columns) in enumerate(((bases.r, 1, min_dim), (max_dim, num_bases, bases.r))):
        step = max(1, _BLOCK // (middle * columns))
        for row in range(0, rows, step):
            block = torch.empty((min(step, rows - row), middle, columns), dtype=dtype, device=device)
            yield bases.fill(block, stream, (row, 0, 0))
