"""A call of a layer, what one pass of it costs, and the strategies that every form of bases says the costs of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

# Integers and flags as numbers: sizes may be symbols of torch.compile, and a product of a bool and a symbol is an error
# in PyTorch 2.11.


@dataclass(frozen=True)
class LayerCall:
    """A call of a layer with T tokens and `n` bases of rank `r`; an element takes `element_bytes`.

    `has_weight`: the op multiplies with the base weight, too. `need_x`, `need_parameters`: which gradients are wanted.
    """

    T: int
    in_features: int
    out_features: int
    n: int
    r: int
    element_bytes: int = 4
    device_type: str = "cpu"
    dropout: int = 0
    has_weight: int = 1
    need_x: int = 1
    need_parameters: int = 1


@dataclass(frozen=True)
class Cost:
    """Of one pass: multiply-adds, bytes that its temporaries take, and bytes that they are moved with."""

    multiply_adds: int
    workspace: int
    traffic: int

    def total(self, balance: int) -> int:
        return self.multiply_adds + balance * self.traffic


class Strategies(ABC):
    """The cost of each pass of a call by each strategy, for bases of one form.

    Here are the terms that all forms have: letters as in :mod:`randlora.planner`, multiply-adds where nothing else is
    said. A term that ends in ``_bytes`` is what a matrix takes.
    """

    def __init__(self, call: LayerCall) -> None:
        self.call = call
        self.m, self.M = min(call.in_features, call.out_features), max(call.in_features, call.out_features)
        self.P = call.n * call.r
        self.wide = call.in_features <= call.out_features
        self.accumulator_bytes = max(4, call.element_bytes)  # per element: sums of 16 bits are kept in 32
        self.frozen = call.T * self.M * self.m if call.has_weight else 0  # x W^T
        self.frozen_dx = self.frozen if call.need_x else 0  # g W
        self.update_bytes = self.M * self.m * call.element_bytes  # dW
        self.dropped_bytes = call.T * call.in_features * call.element_bytes if call.dropout else 0  # dropout(x)
        # Bytes moved to add the update's part to a result that is there: it is read and written.
        self.add_to_y = 2 * call.T * call.out_features * call.element_bytes
        self.add_to_dx = call.need_x * 2 * call.T * call.in_features * call.element_bytes

    @abstractmethod
    def factored_forward(self) -> Cost: ...

    @abstractmethod
    def factored_backward(self) -> Cost: ...

    @abstractmethod
    def materialized_forward(self) -> Cost: ...

    @abstractmethod
    def materialized_backward(self) -> Cost: ...

    @abstractmethod
    def merged_forward(self) -> Cost: ...

    @abstractmethod
    def merged_backward(self) -> Cost: ...

    def costs(self) -> dict[str, tuple[Cost, Cost]]:
        """Forward and backward cost of each strategy that can compute the call.

        No ``merged`` with dropout or without a base weight.
        """
        found = {
            "factored": (self.factored_forward(), self.factored_backward()),
            "materialized": (self.materialized_forward(), self.materialized_backward()),
        }
        if self.call.has_weight and not self.call.dropout:
            found["merged"] = self.merged_forward(), self.merged_backward()
        return found
