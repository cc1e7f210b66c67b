"""Which dtypes there are, and what is computed and kept in more bits than its weight has."""

from __future__ import annotations

import torch

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for all others: the dtype of parameters beside a weight of `dtype`, and of updates.

    Next to 16-bit and quantised weights that is fp32, as a small update would vanish in 16 bits.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
