"""The costs with very sparse bases, which the CPU keeps as lists of what is not zero (csrc/sparse_products.h).

The update is built from what is not zero, which takes the time of moving it and hardly any arithmetic. Only the c
columns in which A has a non-zero take part in products with it:

    ============  =============  =============
    strategy      forward        backward, dx
    ============  =============  =============
    materialized  T (M m + M c)  T (M m + M c)
    merged        T M m          T M m
    ============  =============  =============

``factored`` adds numbers where A and B are not zero. With their density q it takes q T P (m + M) additions for y; for
dx q T P m where in <= out, and as many as for y otherwise. The gradients of the parameters come from the tokens by
every strategy, with q T P (m + M) additions. An addition counts as :data:`ADDITION` multiply-adds.
"""

from __future__ import annotations

from typing import NamedTuple

from .strategies import Cost, LayerCall, Strategies

# What one addition to a vector of tokens costs, in multiply-adds of a dense product; measured. Adding to a vector in
# memory (up) takes longer than adding to one in registers (down).
ADDITION = {"up": 4.9, "down": 3.5}


class Lists(NamedTuple):
    """What the costs of very sparse bases depend on."""

    columns: int  # of A with a non-zero in them
    per_column: float  # non-zeros of a column of B, on average

    def density(self, m: int, M: int, r: int) -> float:
        """Of A and B: from the columns that r rows of it leave empty, as B may have more rows than the layer."""
        if self.columns < m:
            return float(1 - (1 - self.columns / m) ** (1 / r))
        return min(1.0, self.per_column / M)


class Sparse(Strategies):
    """The table above, and the additions of ``factored`` and of the parameters' gradients."""

    def __init__(self, call: LayerCall, lists: Lists) -> None:
        super().__init__(call)
        T, e = call.T, call.element_bytes
        self.through_update = T * self.M * lists.columns  # x dW^T or g dW
        self.compact_bytes = self.M * lists.columns * e  # dW without the columns that are zero
        self.gather_x = 2 * T * lists.columns * e  # bytes moved to gather the features that take part
        q = lists.density(self.m, self.M, call.r)
        through_A, through_B = q * call.n * call.r * self.m, q * call.n * call.r * self.M  # additions per token
        # T may be symbolic under torch.compile: everything else is one integer.
        up, down = (T * int(weight * (through_A + through_B)) for weight in (ADDITION["up"], ADDITION["down"]))
        dx_wide = T * int(ADDITION["down"] * through_A)
        self.y, self.dx = (up, dx_wide) if self.wide else (down, up)
        self.parameters = call.need_parameters * down
        self.entries_bytes = int(q * call.r * self.m) * call.n * self.accumulator_bytes  # of S2, where A is not zero
        # Their gradients are summed in up to 16 parts.
        self.parameters_bytes = call.need_parameters * 17 * self.entries_bytes

    def factored_forward(self) -> Cost:
        return Cost(
            multiply_adds=self.frozen + self.y,
            workspace=self.entries_bytes,
            traffic=self.call.has_weight * self.add_to_y,
        )

    def factored_backward(self) -> Cost:
        return Cost(
            multiply_adds=self.frozen_dx + self.call.need_x * self.dx + self.parameters,
            workspace=self.entries_bytes + self.parameters_bytes,
            traffic=self.call.has_weight * self.add_to_dx,
        )

    def materialized_forward(self) -> Cost:
        """T (M m + M c)"""
        return Cost(
            multiply_adds=self.frozen + self.through_update,
            workspace=self.compact_bytes,
            traffic=3 * self.compact_bytes + self.gather_x + self.add_to_y,
        )

    def materialized_backward(self) -> Cost:
        """T (M m + M c), and the parameters' gradients"""
        need_x = self.call.need_x
        return Cost(
            multiply_adds=self.frozen_dx + need_x * self.through_update + self.parameters,
            workspace=need_x * self.compact_bytes + self.parameters_bytes,
            traffic=need_x * 3 * self.compact_bytes + self.add_to_dx,
        )

    def merged_forward(self) -> Cost:
        """T M m"""
        return Cost(multiply_adds=self.frozen, workspace=self.update_bytes, traffic=4 * self.update_bytes)

    def merged_backward(self) -> Cost:
        """T M m, and the parameters' gradients"""
        need_x = self.call.need_x
        return Cost(
            multiply_adds=self.frozen_dx + self.parameters,
            workspace=need_x * self.update_bytes + self.parameters_bytes,
            traffic=need_x * 4 * self.update_bytes,
        )
