"""The methods that are compared: what each puts on a model, and which learning rates are tried for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: "PEFT LoRA r=8", "hadamard r=32" ...
        build: ``build(model, head, seed) -> (adapted model, parameter groups)``; groups are dicts with "params" and
            "factor", by which the learning rate under trial is multiplied.
        rates: learning rates that are tried; as many for every method.
    """

    name: str
    build: Callable[[nn.Module, list[str], int], tuple[nn.Module, list[dict[str, Any]]]]
    rates: tuple[float, ...]
