"""The costs with dense bases, and with ternary bases at one or two bits per element.

The table of multiply-adds is in :mod:`randlora.planner`. Ternary bases of medium density on the CPU ("planes") build dW
with less arithmetic, and are made dense for the thin products of ``factored``; "bits" are made dense for every product.
Making them dense costs the traffic of that, and they are a temporary then: on the CPU of some 4 MiB. Bases of which the
seed alone is kept are made once in every pass, the same by every strategy, so that none of them gains or loses by it.
"""

from __future__ import annotations

from dataclasses import replace

from .._C import UNPACKED_BYTES  # csrc/packed_update.h: of B, which the CPU makes dense at a time
from .strategies import Cost, LayerCall, Strategies

# Of the dense product's work, what ternary bases at two bits per element cost: a third, in code that is not quite MKL
# (0.3 to 0.4 with AVX-512, 0.4 to 0.55 with AVX2).
PLANES = 0.45

# What making an element of B by Philox takes, in bytes that are moved meanwhile: a core makes 0.3 G (AVX2) to 0.9 G
# (AVX-512) of them in a second and moves 5 GB; an H100 makes 580 G and moves 3 TB.
MAKING = {"cpu": 8, "cuda": 5}


class Dense(Strategies):
    """Two thin products with the hidden numbers ``[T, P]`` between them (factored), or products with ``dW = B2 S2``.

    `form`: None for dense bases, ``"seed"`` for those made in every pass, ``"planes"`` or ``"bits"`` for ternary ones.
    """

    def __init__(self, call: LayerCall, form: str | None = None) -> None:
        super().__init__(call)
        T, m, M, P = call.T, self.m, self.M, self.P
        self.first, self.second = (P * m, P * M) if self.wide else (P * M, P * m)  # per token, in their order
        self.through_update = T * M * m  # x dW^T, g dW or g^T x
        self.build = int(P * M * m * PLANES) if form == "planes" else P * M * m  # dW, or G's part in S2's gradient
        self.S2_bytes = P * m * call.element_bytes
        self.dS2_bytes = call.need_parameters * P * m * self.accumulator_bytes
        self.hidden_bytes = T * P * call.element_bytes
        self.B2_bytes = P * M * call.element_bytes
        self.unpacked_for_products = int(form in ("planes", "bits"))
        self.unpacked_for_update = int(form == "bits")
        self.rows_at_once = call.r  # rows k of A, for which packed bases are made dense at a time
        if call.device_type == "cpu" and call.element_bytes >= 4:
            self.rows_at_once = min(call.r, max(1, UNPACKED_BYTES // (call.n * M * call.element_bytes)))
        self.from_seed = form == "seed"

    def costs(self) -> dict[str, tuple[Cost, Cost]]:
        found = super().costs()
        if self.from_seed:
            for name, (forward, backward) in found.items():
                found[name] = self._with_making(forward), self._with_making(backward)
        return found

    def _with_making(self, cost: Cost) -> Cost:
        """A pass that makes all of B first."""
        making = self.P * self.M * MAKING.get(self.call.device_type, 5)
        return replace(cost, workspace=cost.workspace + self.B2_bytes, traffic=cost.traffic + making)

    def at_once(self, thin_bytes: int, unpacked: int) -> int:
        """Bytes of matrices with an axis P that exist at a time, beside B2 where it is `unpacked`."""
        return (thin_bytes + self.B2_bytes) * self.rows_at_once // self.call.r if unpacked else thin_bytes

    def factored_forward(self) -> Cost:
        """T (M m + P m + P M)"""
        thin_bytes = self.S2_bytes + self.hidden_bytes
        return Cost(
            multiply_adds=self.frozen + self.call.T * (self.first + self.second),
            workspace=self.at_once(thin_bytes, self.unpacked_for_products),
            traffic=2 * (thin_bytes + self.unpacked_for_products * self.B2_bytes) + self.dropped_bytes,
        )

    def factored_backward(self) -> Cost:
        """T (M m + 2 P m + P M); where in > out, the hidden numbers are computed again as well."""
        call, T = self.call, self.call.T
        something = call.need_x or call.need_parameters
        hidden_gradient = something * T * self.second
        dx = call.need_x * T * self.first
        dS2 = call.need_parameters * T * self.P * self.m
        hidden_again = T * self.first if call.need_parameters and not self.wide else 0
        thin_bytes = self.S2_bytes + self.hidden_bytes + self.dS2_bytes
        moved = thin_bytes + self.unpacked_for_products * self.B2_bytes + self.dropped_bytes
        return Cost(
            multiply_adds=self.frozen_dx + hidden_gradient + dx + dS2 + hidden_again,
            workspace=self.at_once(thin_bytes, self.unpacked_for_products),
            traffic=something * 2 * moved,
        )

    def materialized_forward(self) -> Cost:
        """T (M m + M m) + P M m"""
        return Cost(
            multiply_adds=self.frozen + self.through_update + self.build,
            workspace=self._update_workspace(self.S2_bytes),
            traffic=2 * self._built_bytes() + self.dropped_bytes + self.add_to_y,
        )

    def materialized_backward(self) -> Cost:
        """T (2 M m + M m) + 2 P M m"""
        merged = self.merged_backward()
        return Cost(
            multiply_adds=merged.multiply_adds + self.call.need_x * self.through_update,
            workspace=merged.workspace,
            traffic=merged.traffic + self.add_to_dx,
        )

    def merged_forward(self) -> Cost:
        """T M m + P M m"""
        return Cost(
            multiply_adds=self.frozen + self.build,
            workspace=self._update_workspace(self.S2_bytes),
            traffic=2 * self._built_bytes(),
        )

    def merged_backward(self) -> Cost:
        """T (M m + M m) + 2 P M m: for dx the update once more, for the parameters G = g^T x, and B2^T G from it."""
        call = self.call
        something = call.need_x or call.need_parameters
        update = call.need_x * self.build
        dS2 = call.need_parameters * (self.through_update + self.build)
        G_bytes = self.update_bytes + self.unpacked_for_update * self.B2_bytes
        moved = call.need_x * self._built_bytes() + call.need_parameters * G_bytes + self.dS2_bytes
        return Cost(
            multiply_adds=self.frozen_dx + update + dS2,
            workspace=self._update_workspace(self.S2_bytes + self.dS2_bytes),
            traffic=2 * (moved + something * self.dropped_bytes),
        )

    def _update_workspace(self, thin_bytes: int) -> int:
        return self.at_once(thin_bytes, self.unpacked_for_update) + self.update_bytes

    def _built_bytes(self) -> int:
        """What building the update writes: S2, B2 where it is unpacked, and dW."""
        return self.S2_bytes + self.update_bytes + self.unpacked_for_update * self.B2_bytes
