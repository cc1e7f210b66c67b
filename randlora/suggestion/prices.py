"""What a candidate costs, in words."""

from __future__ import annotations

from .candidates import Candidate

MIB = 1 << 20


def price(candidate: Candidate, quantity: str | None) -> str:
    """Of one quantity of the budget's, or of all three."""
    told = {
        "numbers": f"{candidate.trainable_parameters:,} trained numbers",
        "bytes": f"{amount(candidate.memory_bytes)} MiB of training memory",
        "seconds": f"{candidate.step:.2f}x the frozen model's step",
    }
    return ", ".join(told.values()) if quantity is None else told[quantity]


def amount(size: int) -> str:
    """Bytes in MiB, with three digits that count at least, or two of what is very little."""
    mib = size / MIB
    if 0 < mib < 0.01:
        return f"{mib:.1e}" if mib < 1e-4 else f"{mib:.2g}"
    return f"{mib:,.{0 if mib >= 100 else 1 if mib >= 10 else 2}f}"
