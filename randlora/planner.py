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

Very sparse bases (:mod:`randlora.bases.patterns`) build the update from what is non-zero, at the price of moving it; of
the dimension m only the c columns that A has a non-zero in take part in products with the update:

    ============  ====================================  =======================================================
    materialized  T (M m + M c)                         T (M m + 2 M c)
    merged        T M m                                 T (M m + M c)
    ============  ====================================  =======================================================

On the CPU h is cheaper still, with the density q of A and B (csrc/sparse_products.h): q T P (m + M) additions for y, as
many for the parameters' gradients (in place of a product T M c), q T P m more for dx where in <= out, and as many as
for y otherwise. An addition counts as :data:`randlora.costs.ADDITION` multiply-adds.

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

import torch

from .costs import Cost, Lists, costs, hadamard_costs, sparse_costs
from .ops.pattern import ListTensors, is_bits, is_planes, is_signs

STRATEGIES = ("factored", "materialized", "merged")

# Multiply-adds per byte of memory traffic, (device type, bytes per element): CPU cores reach about 35 G/s of them in
# fp32 against 5 GB/s each; an H100 400 T/s in 16 bits, 33 T/s in fp32, against 3 TB/s.
BALANCE = {("cpu", 8): 4, ("cpu", 4): 7, ("cpu", 2): 7, ("cuda", 8): 10, ("cuda", 4): 10, ("cuda", 2): 130}


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
    if is_signs(pattern):
        return "signs"
    if is_bits(pattern):
        return "bits"
    if is_planes(pattern):
        return "planes"
    lists = ListTensors(*pattern)
    return Lists(lists.columns.numel(), lists.b_indices.numel() / (lists.b_starts.numel() // 2))


def options_of(
    T, in_features, out_features, n, r, element_bytes, form, device_type, **needs
) -> dict[str, tuple[Cost, Cost]]:
    """Forward and backward cost of each strategy that can compute the call, whatever the `form` of the bases."""
    # As numbers: a product of a bool and a symbolic size is an error under torch.compile in PyTorch 2.11.
    needs = {name: int(value) for name, value in needs.items()}
    if form == "signs":
        return hadamard_costs(T, in_features, out_features, n, r, element_bytes, device_type=device_type, **needs)
    if isinstance(form, Lists):
        return sparse_costs(T, in_features, out_features, n, r, form, element_bytes, **needs)
    planes, bits = int(form == "planes"), int(form == "bits")
    return costs(
        T, in_features, out_features, n, r, element_bytes, device_type=device_type, planes=planes, bits=bits, **needs
    )


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
