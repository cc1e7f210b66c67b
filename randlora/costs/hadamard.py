"""The costs with Hadamard bases: fast transforms of the tokens, or of the columns of dW (csrc/hadamard.h).

``factored`` multiplies with no matrix but gamma: ``T m n`` multiply-adds for each such product, one forward and three
backward (two where in > out). Its transforms take N log2 N additions per token. It is nearly always the cheapest
strategy; the two others build dW by one transform per column of it.
"""

from __future__ import annotations

from .strategies import Cost, LayerCall, Strategies

# What an addition of a fast transform costs, in multiply-adds of a dense product, by device: a transform loads a number
# for a single addition, a product for as many multiply-adds as there are columns.
TRANSFORM = {"cpu": 3.0, "cuda": 2.0}

# Bytes of a tile of tokens with everything that is computed from it: the ops work on one tile at a time.
TILE = {"cpu": 4 << 20, "cuda": 32 << 20}


class Hadamard(Strategies):
    """Products with gamma and fast transforms."""

    def __init__(self, call: LayerCall) -> None:
        super().__init__(call)
        T, n = call.T, call.n
        weight = TRANSFORM.get(call.device_type, TRANSFORM["cuda"])
        steps_in_groups, steps = _log2(call.r), _log2(max(self.M, self.P))
        R, N = 2**steps_in_groups, 2**steps
        # Per token. T may be symbolic under torch.compile: everything else is one integer.
        product = self.m * n  # of R small products together
        in_groups = R * n * steps_in_groups  # additions: the transforms of its groups
        hidden = N * steps  # additions: the transform of its hidden numbers
        self.y = product + int(weight * (in_groups + hidden))
        # z by one transform, dgamma from it, and v for dlambda once more from x.
        self.parameters = call.need_parameters * (self.y + product + int(weight * in_groups))
        self.dx = call.need_x * (product if self.wide and call.need_parameters else self.y)
        if not self.wide and call.need_parameters and call.need_x:
            self.dx = int(weight * hidden)  # v is there
        tile_bytes = TILE.get(call.device_type, TILE["cuda"])
        self.tile_bytes = min(tile_bytes, T * (R * n + N) * self.accumulator_bytes)
        self.through_update = T * self.M * self.m  # x dW^T, g dW or g^T x
        self.build = int(weight * self.m * hidden)  # a transform per column of dW
        # On the CPU the op takes the parameters' gradients from the tokens by every strategy: no gradient of dW.
        if call.device_type == "cpu":
            self.parameters_by_update, self.G_bytes = T * self.parameters, 0
        else:
            self.parameters_by_update = call.need_parameters * (self.through_update + 2 * self.build)
            self.G_bytes = call.need_parameters * self.M * self.m * self.accumulator_bytes

    def factored_forward(self) -> Cost:
        return Cost(
            multiply_adds=self.frozen + self.call.T * self.y,
            workspace=self.tile_bytes,
            traffic=self.call.has_weight * self.add_to_y,
        )

    def factored_backward(self) -> Cost:
        return Cost(
            multiply_adds=self.frozen_dx + self.call.T * (self.parameters + self.dx),
            workspace=self.tile_bytes,
            traffic=self.call.has_weight * self.add_to_dx,
        )

    def materialized_forward(self) -> Cost:
        return Cost(
            multiply_adds=self.frozen + self.through_update + self.build,
            workspace=self.update_bytes,
            traffic=2 * self.update_bytes + self.dropped_bytes + self.add_to_y,
        )

    def materialized_backward(self) -> Cost:
        need_x = self.call.need_x
        dx = need_x * (self.through_update + self.build)
        built_bytes = need_x * self.update_bytes + self.G_bytes
        return Cost(
            multiply_adds=self.frozen_dx + dx + self.parameters_by_update,
            workspace=built_bytes,
            traffic=2 * built_bytes + self.dropped_bytes + self.add_to_dx,
        )

    def merged_forward(self) -> Cost:
        return Cost(multiply_adds=self.frozen + self.build, workspace=self.update_bytes, traffic=4 * self.update_bytes)

    def merged_backward(self) -> Cost:
        need_x = self.call.need_x
        return Cost(
            multiply_adds=self.frozen_dx + need_x * self.build + self.parameters_by_update,
            workspace=need_x * self.update_bytes + self.G_bytes,
            traffic=2 * (need_x * 2 * self.update_bytes + self.G_bytes),
        )


def _log2(size: int) -> int:
    """Rounded up. A loop, as sizes may be symbols, which have no bit_length()."""
    steps, power = 0, 1
    while power < size:
        steps, power = steps + 1, 2 * power
    return steps
