"""What a call costs by each strategy, for every form of bases; :mod:`randlora.planner` says why, and compares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from ._C import UNPACKED_BYTES  # csrc/packed_update.h: of B, which the CPU makes dense at a time

# An addition of a fast transform, in multiply-adds of a dense product, by device: it moves a number through
# registers for each, where a product has it at hand for as many as there are columns.
TRANSFORM = {"cpu": 3.0, "cuda": 2.0}

# Bytes of a tile of tokens with all that is computed of it: what the ops work on at a time.
TILE = {"cpu": 4 << 20, "cuda": 32 << 20}

# Of the dense product's work, what ternary bases at two bits per element cost: a third, in code that is not quite MKL
# (0.3 to 0.4 with AVX-512, 0.4 to 0.55 with AVX2).
PLANES = 0.45

# An addition from lists to a vector of tokens, in multiply-adds of a dense product. Measured; adding to a vector in
# memory (h to y, csrc/sparse_products.h) takes longer than to one in a register.
ADDITION = {"up": 4.9, "down": 3.5}


@dataclass(frozen=True)
class Cost:
    """Of one pass: multiply-adds, bytes that its temporaries take, and bytes that they are moved with."""

    multiply_adds: int
    workspace: int
    traffic: int

    def total(self, balance: int) -> int:
        return self.multiply_adds + balance * self.traffic


class Lists(NamedTuple):
    """What the costs of very sparse bases depend on."""

    columns: int  # of A with a non-zero in them
    per_column: float  # non-zeros of a column of B, on average

    def density(self, m: int, M: int, r: int) -> float:
        """Of A and B: from the columns that r rows of it leave empty, as B may have more rows than the layer."""
        if self.columns < m:
            return 1 - (1 - self.columns / m) ** (1 / r)
        return min(1.0, self.per_column / M)


def costs(
    T: int,
    in_features: int,
    out_features: int,
    n: int,
    r: int,
    element_bytes: int = 4,
    *,
    dropout: bool = False,
    has_weight: bool = True,
    need_x: bool = True,
    need_parameters: bool = True,
    planes: bool = False,
    bits: bool = False,
    device_type: str = "cpu",
) -> dict[str, tuple[Cost, Cost]]:
    """Forward and backward cost of each strategy that can compute the call.

    No ``merged`` with dropout or without a base weight. `planes`, `bits`: the form of the bases, if they are packed.
    """
    m, M, P, e = min(in_features, out_features), max(in_features, out_features), n * r, element_bytes
    wide = in_features <= out_features
    packed = planes or bits
    base = T * M * m if has_weight else 0
    first, second = (P * m, P * M) if wide else (P * M, P * m)  # the two thin products
    build = int(P * M * m * PLANES) if planes else P * M * m
    scaled, dense, hidden = P * m * e, M * m * e, T * P * e
    gradient = need_parameters * P * m * max(4, e)  # of the scaled base
    unpacked, rows = P * M * e, r  # bases made dense, for a group of rows k of A at a time
    if device_type == "cpu" and e >= 4:
        rows = min(r, max(1, UNPACKED_BYTES // (n * M * e)))

    def at_once(thin: int, unpacks: bool) -> int:
        """Of matrices with an axis P, how much there is at a time."""
        return (thin + unpacked) * rows // r if unpacks else thin

    dropped = T * in_features * e if dropout else 0
    backward = need_x or need_parameters
    dx = base if need_x else 0

    rebuild = T * first if need_parameters and not wide else 0  # a tall layer needs h again
    found = {
        "factored": (
            Cost(
                base + T * (first + second),
                at_once(scaled + hidden, packed),
                2 * (scaled + hidden + packed * unpacked) + dropped,
            ),
            Cost(
                dx + backward * T * second + need_x * T * first + need_parameters * T * P * m + rebuild,
                at_once(scaled + hidden + gradient, packed),
                backward * 2 * (scaled + hidden + gradient + packed * unpacked + dropped),
            ),
        )
    }
    # Through dW: G = g^T x and B2^T G for the parameters, dW once more for x.
    multiply_adds = dx + need_x * build + need_parameters * (T * M * m + build)
    made = bits * unpacked
    workspace = at_once(scaled + gradient, bits) + dense
    traffic = 2 * (need_x * (scaled + dense + made) + need_parameters * (dense + made) + gradient + backward * dropped)
    passes = 2 * T * out_features * e, need_x * 2 * T * in_features * e  # over the results, to add to them
    found["materialized"] = (
        Cost(
            base + T * M * m + build,
            at_once(scaled, bits) + dense,
            2 * (scaled + dense + made) + dropped + passes[0],
        ),
        Cost(multiply_adds + need_x * T * M * m, workspace, traffic + passes[1]),
    )
    if has_weight and not dropout:
        found["merged"] = (
            Cost(base + build, at_once(scaled, bits) + dense, 2 * (scaled + dense + made)),
            Cost(multiply_adds, workspace, traffic),
        )
    return found


def sparse_costs(
    T: int,
    in_features: int,
    out_features: int,
    n: int,
    r: int,
    lists: Lists,
    element_bytes: int = 4,
    *,
    dropout: bool = False,
    has_weight: bool = True,
    need_x: bool = True,
    need_parameters: bool = True,
) -> dict[str, tuple[Cost, Cost]]:
    """As :func:`costs`, for very sparse bases, which are lists on the CPU."""
    m, M, e = min(in_features, out_features), max(in_features, out_features), element_bytes
    columns, wide = lists.columns, in_features <= out_features
    base, part = (T * M * m if has_weight else 0), T * M * columns
    dense, compact = M * m * e, M * columns * e
    # The features that take part are gathered, and a result that only some have a part in is added to.
    gathered = 2 * T * columns * e
    dx = base if need_x else 0
    q, accumulator = lists.density(m, M, r), max(4, e)
    additions = q * n * r * m, q * n * r * M  # of a token: with C and with B2
    # T may be symbolic under torch.compile: everything else is one integer.
    up, down = (T * int(weight * sum(additions)) for weight in (ADDITION["up"], ADDITION["down"]))
    forward, backward = (up, T * int(ADDITION["down"] * additions[0])) if wide else (down, up)
    entries = int(q * r * m) * n * accumulator  # of C: the coefficients, and their gradients in up to 16 parts
    through_tokens = need_parameters * down, need_parameters * 17 * entries  # the parameters' gradients
    added = 2 * T * e * has_weight
    found = {
        "factored": (
            Cost(base + forward, entries, added * out_features),
            Cost(dx + need_x * backward + through_tokens[0], entries + through_tokens[1], need_x * added * in_features),
        ),
        "materialized": (
            Cost(base + part, compact, 3 * compact + gathered + 2 * T * out_features * e),
            Cost(
                dx + need_x * part + through_tokens[0],
                need_x * compact + through_tokens[1],
                need_x * (3 * compact + 2 * T * in_features * e),
            ),
        ),
    }
    if has_weight and not dropout:
        found["merged"] = (
            Cost(base, dense, 4 * dense),
            Cost(dx + through_tokens[0], need_x * dense + through_tokens[1], need_x * 4 * dense),
        )
    return found


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
    """As :func:`costs`, for Hadamard bases: transforms of tokens, or of the columns of dW."""
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
    # On the CPU the parameters' gradients come from the tokens all the same, without one of dW (csrc/layer).
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
