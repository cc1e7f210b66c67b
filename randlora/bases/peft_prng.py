"""PEFT's own random bases, number for number (peft 0.16 to 0.21, ``tuners/randlora/model.py``).

They come from torch's CPU generator, A before B, and their values depend on the sizes drawn: the number of elements
sets what is drawn when, and every base is divided by its own sample standard deviation. Dense ones depend on torch's
version as well: to 2.11 a 16-bit number is made of other bits of the generator's than from 2.12 on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def draw(
    max_dim: int, min_dim: int, num_bases: int, r: int, seed: int, sparsity: float | None, half: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A ``[r, 1, min_dim]`` and B ``[max_dim, num_bases, r]``; dense in `half` precision, ternary in float32.

    `half` is bfloat16 where PEFT finds it available and float16 elsewhere: the two give different numbers.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    if sparsity is None:
        A = _kaiming((r, 1, min_dim), half, generator)
        B = torch.cat([_kaiming((max_dim, 1, r), half, generator) for _ in range(num_bases)], dim=1)
    else:
        A = _ternary((r, 1, min_dim), sparsity, generator)
        B = _ternary((max_dim, num_bases, r), sparsity, generator)
    return A / A.std(), B / B.std()


def _kaiming(shape: tuple[int, ...], half: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.nn.init.kaiming_uniform_(torch.empty(shape, dtype=half), a=math.sqrt(5), generator=generator)


def _ternary(shape: tuple[int, ...], sparsity: float, generator: torch.Generator) -> Tensor:
    u = torch.rand(shape, dtype=torch.float32, generator=generator)
    edge = 1 / (2 * sparsity)
    return (u > 1 - edge).float() - (u < edge).float()
