"""What a call costs by a strategy, and the costs of Hadamard bases; :mod:`randlora.planner` compares them."""

from __future__ import annotations

from dataclasses import dataclass

# An addition of a fast transform, in multiply-adds of a dense product, by device: it moves a number through
# registers for each, where a product has it at hand for as many as there are columns.
TRANSFORM = {"cpu": 3.0, "cuda": 2.0}

# Bytes of a tile of tokens with all that is computed of it: what the ops work on at a time.
TILE = {"cpu": 4 << 20, "cuda": 32 << 20}


@dataclass(frozen=True)
class Cost:
    """Of one pass: multiply-adds, bytes that its temporaries take, and bytes that they are moved with."""

    multiply_adds: int
    workspace: int
    traffic: int

    def total(self, balance: int) -> int:
        return self.multiply_adds + balance * self.traffic


def hadamard_costs(
    T: int,
    in_features: int,
    out_features: int,
    n: int,
    r: int,
    element_bytes: int = 4,
    *,
    device_type: str = "cpu",
    dropout: bool = False,
    has_weight: bool = True,
    need_x: bool = True,
    need_parameters: bool = True,
) -> dict[str, tuple[Cost, Cost]]:
    """As :func:`randlora.planner.costs`, for Hadamard bases: transforms of tokens, or of the columns of dW."""
    m, M, P, e = min(in_features, out_features), max(in_features, out_features), n * r, element_bytes
    wide = in_features <= out_features
    group_steps, steps = _log2(r), _log2(max(M, P))
    R, N = 2**group_steps, 2**steps
    base = T * M * m if has_weight else 0
    dx = base if need_x else 0
    # Of a token: one of R small products together, the transform of its groups, that of its hidden numbers. T may be
    # symbolic under torch.compile: everything else is one integer.
    weight = TRANSFORM.get(device_type, TRANSFORM["cuda"])
    product, groups, hidden = m * n, R * n * group_steps, N * steps
    pass_ = product + int(weight * (groups + hidden))
    # Backward: z by one transform, dx and dgamma of it, and v for dlambda once more from x; a tall layer's dx is up().
    gradients = need_parameters * (pass_ + product + int(weight * groups))
    to_x = need_x * (product if wide and need_parameters else pass_)
    if not wide and need_parameters and need_x:
        to_x = int(weight * hidden)  # v is there
    acc = max(4, e)
    work = min(TILE.get(device_type, TILE["cuda"]), T * (R * n + N) * acc)
    moved = 2 * T * e * has_weight
    found = {
        "factored": (
            Cost(base + T * pass_, work, moved * out_features),
            Cost(dx + T * (gradients + to_x), work, need_x * moved * in_features),
        )
    }
    build = int(weight * m * hidden)
    dense, gradient = M * m * e, need_parameters * M * m * acc
    dropped = T * in_features * e if dropout else 0
    # On the CPU the parameters' gradients come from the tokens all the same (csrc/linear.cpp): no gradient of dW.
    through_dW = need_parameters * (T * M * m + 2 * build)
    if device_type == "cpu":
        through_dW, gradient = T * gradients, 0
    passes = 2 * T * out_features * e, need_x * 2 * T * in_features * e  # over the results, to add to them
    found["materialized"] = (
        Cost(base + T * M * m + build, dense, 2 * dense + dropped + passes[0]),
        Cost(
            dx + need_x * (T * M * m + build) + through_dW,
            need_x * dense + gradient,
            2 * (need_x * dense + gradient) + dropped + passes[1],
        ),
    )
    if has_weight and not dropout:
        found["merged"] = (
            Cost(base + build, dense, 4 * dense),
            Cost(dx + need_x * build + through_dW, need_x * dense + gradient, 2 * (need_x * 2 * dense + gradient)),
        )
    return found


def _log2(size: int) -> int:
    """Rounded up. A loop, as sizes may be symbols, which have no bit_length()."""
    steps, power = 0, 1
    while power < size:
        steps, power = steps + 1, 2 * power
    return steps
