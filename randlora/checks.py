"""Argument checks whose messages say what was expected and what came."""

from __future__ import annotations

import math
import numbers

import torch

from .dtypes import FLOATS

# Far above what any layer has a use for, and low enough that sizes stay numbers a machine can count with.
MAX_RANK = 2**16


def require_int(name: str, value: int, low: int, high: int | None = None) -> int:
    """`value` as an int in [low, high], or TypeError / ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < low or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return int(value)


def require_size(name: str, value: int, high: int = MAX_RANK) -> int:
    """`value` as an int that some dimension can have, or TypeError / ValueError."""
    if require_int(name, value, 1) > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
    return int(value)


def require_float(name: str, value: float, low: float = -math.inf, high: float = math.inf) -> float:
    """`value` as a finite float in [low, high), or TypeError / ValueError."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value) or not low <= value < high:
        bounds = "finite" if math.isinf(low) else f"at least {low:g} and below {high:g}"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return float(value)


def require_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """A floating dtype that the ops support, or TypeError."""
    if dtype not in FLOATS:
        raise TypeError(f"{name} must be one of {', '.join(str(d) for d in FLOATS)}, got {dtype}")
    return dtype
