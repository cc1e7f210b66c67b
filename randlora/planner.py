"""Which of the three ways to compute a layer is the cheapest: a small cost model (`randlora.explain` prints it).

With T tokens, ``m = min(in, out)``, ``M = max(in, out)``, n bases of rank r and ``P = n * r`` (square, full rank:
``P = m = M = d``), the multiply-adds of one call are

    ============  ====================================  =======================================================
    strategy      forward                               backward
    ============  ====================================  =======================================================
    factored      T (M m + P m + P M)                   T (M m + 2 P m + P M)
    materialized  T (M m + M m) + P M m                 T (2 M m + M m) + 2 P M m
    merged        T M m + P M m                         T (M m + M m) + 2 P M m
    ============  ====================================  =======================================================

(square: 3T | 4T, 2T + d | 3T + 2d, T + d | 2T + 2d, in units of d^2). Gradients that nobody needs are left out. To
these come the bytes that temporaries are written and read with, weighed by how many multiply-adds the device does in
the time of one byte (:data:`BALANCE`). The strategy with the smallest sum is taken, for the forward and for the
backward by itself, as nothing passes between them: between T = d/2 and T = d that is ``merged`` forward and
``factored`` backward (5T + d). ``merged`` is taken only where
the weight itself is fp32 or fp64 and so is the computation: in 16 bits, W + dW rounds away updates below half a unit
in the last place of W.

Very sparse bases (:mod:`randlora.patterns`) build the update from what is non-zero, at the price of moving it; of the
dimension m only the c columns that A has a non-zero in take part in products with the update:

    ============  ====================================  =======================================================
    materialized  T (M m + M c)                         T (M m + 2 M c)
    merged        T M m                                 T (M m + M c)
    ============  ====================================  =======================================================

On the CPU h is cheaper still, with the density q of A and B (csrc/sparse_products.h): q T P (m + M) additions for y, as
many for the parameters' gradients (in place of a product T M c), q T P m more for dx where in <= out, and as many as
for y otherwise. An addition counts as :data:`ADDITION` multiply-adds.

Those of medium density on the CPU (planes) cost a third of P M m where dW is built. What is made dense for the call,
planes for ``factored`` and bits always, costs the traffic of that, and is a temporary: on the CPU of some 4 MiB.

Hadamard bases take ``T m n`` multiply-adds for each product with gamma, one forward and three backward, and transforms
of N log2 N additions per token, or per column of dW (:mod:`randlora.costs`); there ``factored`` is nearly always the
cheapest, as it multiplies with no matrix but gamma.

Where a call is traced (torch.compile, torch.export), the number of tokens may be a symbol, and comparing it would tie
the graph to one side of the comparison. All costs are straight lines in T, so there :func:`plan` says from how many
tokens on which strategy is the cheapest, and the op looks up its own number of tokens when it runs: one graph serves
all sizes, and takes for each what an eager call would.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from .costs import Cost, hadamard_costs
from .patterns import is_bits, is_hadamard, is_planes

STRATEGIES = ("factored", "materialized", "merged")

# Multiply-adds per byte of memory traffic, (device type, bytes per element): CPU cores reach about 35 G/s of them in
# fp32 against 5 GB/s each; an H100 400 T/s in 16 bits, 33 T/s in fp32, against 3 TB/s.
BALANCE = {("cpu", 8): 4, ("cpu", 4): 7, ("cpu", 2): 7, ("cuda", 8): 10, ("cuda", 4): 10, ("cuda", 2): 130}


# Of the dense product's work, what ternary bases at two bits per element cost: a third, in code that is not quite MKL
# (0.3 to 0.4 with AVX-512, 0.4 to 0.55 with AVX2).
PLANES = 0.45

# Bytes of B that the CPU makes dense at a time (csrc/packed_update.h: unpacked_rows).
UNPACKED_GROUP = 4 << 20

# An addition from lists to a vector of tokens, in multiply-adds of a dense product. Measured; adding to a vector in
# memory (h to y, csrc/sparse_products.h) takes longer than to one in a register.
ADDITION = {"up": 4.9, "down": 3.5}


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
    # Numbers: a product of a bool and a symbolic size is an error under torch.compile in PyTorch 2.11.
    need_x, need_parameters, packed, bits = int(need_x), int(need_parameters), int(planes or bits), int(bits)
    base = T * M * m if has_weight else 0
    first, second = (P * m, P * M) if wide else (P * M, P * m)  # the two thin products
    build = int(P * M * m * PLANES) if planes else P * M * m
    scaled, dense, hidden = P * m * e, M * m * e, T * P * e
    gradient = need_parameters * P * m * max(4, e)  # of the scaled base
    unpacked, rows = P * M * e, r  # bases made dense, for a group of rows k of A at a time
    if device_type == "cpu" and e >= 4:
        rows = min(r, max(1, UNPACKED_GROUP // (n * M * e)))

    def at_once(thin: int, unpacks: int) -> int:
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
    need_x, need_parameters, has_weight = int(need_x), int(need_parameters), int(has_weight)
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


def choose(
    T: int,
    in_features: int,
    out_features: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    device_type: str,
    *,
    dropout: bool = False,
    need_x: bool = True,
    need_parameters: bool = True,
    form: Lists | str | None = None,
) -> tuple[str, str]:
    """The cheapest strategy forward and backward.

    `weight_dtype` None: there is no base weight to work with. `form`: of the bases, see :func:`form`.
    """
    totals = _totals(
        T, in_features, out_features, n, r, dtype, weight_dtype, device_type, dropout=dropout, need_x=need_x,
        need_parameters=need_parameters, form=form,
    )  # fmt: skip
    return tuple(_lowest({name: passes[which] for name, passes in totals.items()}) for which in (0, 1))


def plan(*shape, **needs) -> tuple[str, str]:
    """What :func:`choose` gives for every T, as the op takes it: ``"factored<340,merged"`` is factored below 340 tokens
    and merged from there on. Arguments as for `choose`, without T.
    """
    at_0, at_1 = (_totals(T, *shape, **needs) for T in (0, 1))
    return tuple(
        _envelope({name: (start[which], at_1[name][which] - start[which]) for name, start in at_0.items()})
        for which in (0, 1)
    )


remembered_plan = functools.lru_cache(maxsize=4096)(plan)  # of its arguments, which are all it depends on


def _envelope(lines: dict[str, tuple[int, int]]) -> str:
    """Which of the lines ``start + slope * T`` is the lowest, from T = 0 on; the first of them where some are equal."""
    T, parts = 0, []
    while True:
        found = _lowest({name: start + slope * T for name, (start, slope) in lines.items()})
        start, slope = lines[found]
        limit, comes_first = None, True
        for name, (other_start, other_slope) in lines.items():
            if name == found:
                comes_first = False
            elif other_slope < slope:
                ahead, gain = other_start - start, slope - other_slope
                crossing = -(-ahead // gain) if comes_first else ahead // gain + 1  # as low, or lower
                limit = crossing if limit is None or crossing < limit else limit
        if limit is None:
            return ",".join([*parts, found])
        parts.append(f"{found}<{limit}")
        T = limit


def _lowest(totals: dict[str, int]) -> str:
    # A loop, not min(): torch.compile does not trace min() with a key.
    found = next(iter(totals))
    for name, total in totals.items():
        if total < totals[found]:
            found = name
    return found


def price_of_update(
    T: int, in_features: int, out_features: int, n: int, r: int, dtype: torch.dtype, device_type: str, pattern
) -> tuple[float, float]:
    """What T tokens under ``no_grad`` spend on the update at the least, and what building ``dW`` costs, in one unit."""
    return _price_of_update(T, in_features, out_features, n, r, dtype, device_type, form(pattern))


@functools.lru_cache(maxsize=4096)  # until an update has paid for itself, every word asks
def _price_of_update(
    T: int, in_features: int, out_features: int, n: int, r: int, dtype: torch.dtype, device_type: str, bases_form
) -> tuple[float, float]:
    balance = BALANCE.get((device_type, dtype.itemsize), 10.0)
    call, build = (
        options_of(
            tokens, in_features, out_features, n, r, dtype.itemsize, bases_form, device_type,
            has_weight=False, need_x=False, need_parameters=False,
        )
        for tokens in (T, 0)
    )  # fmt: skip
    return min(cost[0].total(balance) for cost in call.values()), build["materialized"][0].total(balance)


def form(pattern) -> Lists | str | None:
    """What the costs depend on: :class:`Lists`, ``"planes"``, ``"bits"``, ``"signs"``, or None for dense bases."""
    if pattern is None:
        return None
    if is_hadamard(pattern):
        return "signs"
    if is_planes(pattern):
        return "bits" if is_bits(pattern) else "planes"
    columns, _, _, b_starts, b_indices = pattern
    return Lists(columns.numel(), b_indices.numel() / (b_starts.numel() // 2))


def options_of(
    T, in_features, out_features, n, r, element_bytes, form, device_type, **needs
) -> dict[str, tuple[Cost, Cost]]:
    """Forward and backward cost of each strategy that can compute the call, whatever the `form` of the bases."""
    if form == "signs":
        return hadamard_costs(T, in_features, out_features, n, r, element_bytes, device_type=device_type, **needs)
    if isinstance(form, Lists):
        return sparse_costs(T, in_features, out_features, n, r, form, element_bytes, **needs)
    needs |= {"device_type": device_type, "planes": form == "planes", "bits": form == "bits"}
    return costs(T, in_features, out_features, n, r, element_bytes, **needs)


def _totals(
    T, in_features, out_features, n, r, dtype, weight_dtype, device_type, *, form=None, **needs
) -> dict[str, tuple[int, int]]:
    """Cost forward and backward of the strategies that `auto` takes for this call."""
    has_weight = weight_dtype is not None
    options = options_of(
        T, in_features, out_features, n, r, dtype.itemsize, form, device_type, has_weight=has_weight, **needs
    )
    if not (weight_dtype == dtype and dtype in (torch.float32, torch.float64)):
        options.pop("merged", None)
    balance = BALANCE.get((device_type, dtype.itemsize), 10)
    return {name: tuple(cost.total(balance) for cost in passes) for name, passes in options.items()}
