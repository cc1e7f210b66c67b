"""What a user wants to spend little of."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .candidates import Candidate

QUANTITIES = {"numbers": "trainable_parameters", "bytes": "memory_bytes", "seconds": "step"}
UNITS = {
    "numbers": {"": 1, "k": 10**3, "m": 10**6, "b": 10**9},
    "bytes": {"": 1, "b": 1}
    | {f"{prefix}{unit}": base**power
       for power, prefix in enumerate("kmgt", 1) for unit, base in (("b", 1000), ("ib", 1024))},
    "seconds": {"x": 1},
}  # fmt: skip
EXAMPLES = {"numbers": "numbers=2e6", "bytes": "bytes=8GiB", "seconds": "seconds=1.2x"}


@dataclass(frozen=True)
class Budget:
    """As little as possible of `quantity`, or at most `limit` of it; without a quantity all three weigh alike.

    `said`: as the user put it.
    """

    quantity: str | None = None
    limit: float | None = None
    said: str = "balanced"

    @classmethod
    def of(cls, text: str | None) -> Budget:
        """``numbers``, ``bytes`` or ``seconds``, or with a limit as in :data:`EXAMPLES`. Raises ``ValueError``."""
        if text is None:
            return cls()
        if not isinstance(text, str):
            raise TypeError(f"budget must be None or a string such as 'numbers' or 'bytes=8GiB', got {text!r}")
        said = text.strip()
        quantity, equals, limit = (part.strip() for part in said.lower().partition("="))
        if quantity not in QUANTITIES:
            raise ValueError(f"budget must be one of {', '.join(QUANTITIES)}, or such as bytes=8GiB, got {text!r}")
        if not equals:
            return cls(quantity, said=said)
        found = re.fullmatch(r"([0-9]+(?:_[0-9]+)*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([a-z]*)", limit)
        units = UNITS[quantity]
        value = float(found[1]) * units[found[2]] if found and found[2] in units else math.nan
        if not 0 < value < math.inf:
            why = (
                ": a step's limit is how many times as long it may take as one of the frozen model, as the seconds "
                "themselves are the machine's"
            )  # fmt: skip
            raise ValueError(
                f"the limit in budget={text!r} must be a number greater than 0, such as {EXAMPLES[quantity]}"
                + why * (quantity == "seconds")
            )
        return cls(quantity, value, said)

    def amount(self, candidate: Candidate) -> float:
        """What `candidate` takes of the quantity; without one: the product of all three."""
        if self.quantity is None:
            return float(candidate.trainable_parameters) * candidate.memory_bytes * candidate.step
        return float(getattr(candidate, QUANTITIES[self.quantity]))

    def allows(self, candidate: Candidate) -> bool:
        return self.limit is None or self.amount(candidate) <= self.limit

    def __str__(self) -> str:
        return self.said
