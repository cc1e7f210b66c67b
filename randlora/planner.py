"""Which of the three ways to compute a layer is the cheapest: a small cost model (`randlora.explain` prints it).

With T tokens, ``m = min(in, out)``, ``M = max(in, out)``, n bases of rank r and ``P = n * r``, one call with dense
bases takes these multiply-adds (:mod:`randlora.costs.dense`; "square": ``P = m = M = d``, in units of d^2):

    ============  ====================================  ====================================  ===============
    strategy      forward                               backward                              square
    ============  ====================================  ====================================  ===============
    factored      T (M m + P m + P M)                   T (M m + 2 P m + P M)                 3T     | 4T
    materialized  T (M m + M m) + P M m                 T (2 M m + M m) + 2 P M m             2T + d | 3T + 2d
    merged        T M m + P M m                         T (M m + M m) + 2 P M m               T + d  | 2T + 2d
    ============  ====================================  ====================================  ===============

Other forms of bases have costs of their own: :mod:`randlora.costs.lists` and :mod:`randlora.costs.hadamard`. Gradients
that nobody needs are left out.

Temporaries cost time, too: the bytes with which they are written and read count as multiply-adds, as many as the device
does in the time of one byte (:data:`BALANCE`). The strategy with the smallest sum is taken. Forward and backward are
decided apart, as nothing passes between them: between T = d/2 and T = d the best pair is ``merged`` forward and
``factored`` backward (5T + d). ``merged`` is taken only where the weight and the computation are both fp32 or both
fp64: in 16 bits, W + dW rounds away updates below half a unit in the last place of W.

When a call is traced (torch.compile, torch.export), the number of tokens may be a symbol, and comparing it with a
number would tie the graph to one side of the comparison. But every cost is a straight line in T. So :func:`plan` says
from how many tokens on which strategy is the cheapest, and the op looks up its own number of tokens when it runs: one
graph serves all sizes, and takes for each what an eager call would take.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .costs.dense import Dense
from .costs.hadamard import Hadamard
from .costs.lists import Lists, Sparse
from .costs.strategies import Cost, LayerCall
from .dtypes import at_least_fp32
from .ops.pattern import ListTensors, is_bits, is_planes, is_seed, is_signs

STRATEGIES = ("factored", "materialized", "merged")

# (device type, bytes per element) -> multiply-adds in the time of one byte of memory traffic. A CPU core does about
# 35 G of them per second in fp32 and moves 5 GB; an H100 does 400 T in 16 bits or 33 T in fp32, and moves 3 TB.
BALANCE = {("cpu", 8): 4, ("cpu", 4): 7, ("cpu", 2): 7, ("cuda", 8): 10, ("cuda", 4): 10, ("cuda", 2): 130}


def _balance(device_type: str, dtype: torch.dtype) -> int:
    return BALANCE.get((device_type, dtype.itemsize), 10)


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
    """The cheapest strategies for the forward and for the backward pass of one call.

    Args:
        T: number of tokens. n: number of bases. r: rank of one base.
        dtype: that the layer computes in. weight_dtype: of the base weight; None if the op has no weight to multiply
            with.
        dropout: whether it takes place. need_x, need_parameters: which gradients are wanted.
        form: of the bases, as :func:`form` gives it.
    """
    totals = totals_of(
        T, in_features, out_features, n, r, dtype, weight_dtype, device_type, dropout=dropout, need_x=need_x,
        need_parameters=need_parameters, form=form,
    )  # fmt: skip
    forward, backward = (_lowest({name: passes[which] for name, passes in totals.items()}) for which in (0, 1))
    return forward, backward


def plan(*shape: Any, **needs: Any) -> tuple[str, str]:
    """The strategies that :func:`choose` gives, for all T at once, as the op reads them.

    ``"factored<340,merged"`` means factored below 340 tokens and merged from there on. Arguments as for `choose`,
    without T.
    """
    at_0, at_1 = (totals_of(T, *shape, **needs) for T in (0, 1))
    forward, backward = (
        _envelope({name: (start[which], at_1[name][which] - start[which]) for name, start in at_0.items()})
        for which in (0, 1)
    )
    return forward, backward


remembered_plan = functools.lru_cache(maxsize=4096)(plan)


def _envelope(lines: dict[str, tuple[int, int]]) -> str:
    """The plan that takes the lowest of the lines ``start + slope * T`` for every T >= 0; of equal ones the first."""
    T = 0
    parts: list[str] = []
    while True:
        found = _lowest({name: start + slope * T for name, (start, slope) in lines.items()})
        start, slope = lines[found]
        limit, comes_first = None, True
        for name, (other_start, other_slope) in lines.items():
            if name == found:
                comes_first = False
            elif other_slope < slope:
                ahead, gain = other_start - start, slope - other_slope
                # The first T at which the other is as low, if it comes first, or lower, if it does not.
                crossing = -(-ahead // gain) if comes_first else ahead // gain + 1
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


def require_strategy(strategy: str) -> None:
    """Raises ``ValueError`` for what is no strategy of a layer."""
    if strategy not in ("auto", *STRATEGIES):
        raise ValueError(f"strategy must be one of auto, {', '.join(STRATEGIES)}, got {strategy!r}")


def without_weight(strategy: str) -> str:
    """The strategy that a layer takes in place of its own where the op has no weight to merge into."""
    return "auto" if strategy == "merged" else strategy


def merges_exactly(dtype: torch.dtype) -> bool:
    """Whether W + dW in `dtype` keeps what an update adds, so that ``merged`` may be taken without being asked for."""
    return dtype == at_least_fp32(dtype)


@functools.lru_cache(maxsize=4096)  # a layer asks at every word until its update is built
def price_of_update(
    T: int,
    in_features: int,
    out_features: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    device_type: str,
    form: Lists | str | None,
) -> tuple[float, float]:
    """The least that a call with T tokens under ``no_grad`` spends on its update, and what building ``dW`` costs.

    Both in multiply-adds. `form`: of the bases, as :func:`form` gives it.
    """

    def costs(tokens: int) -> dict[str, tuple[Cost, Cost]]:
        call = LayerCall(
            tokens, in_features, out_features, n, r, dtype.itemsize, device_type, has_weight=0, need_x=0,
            need_parameters=0,
        )  # fmt: skip
        return costs_of(call, form)

    balance = _balance(device_type, dtype)
    forwards = [forward for forward, _ in costs(T).values()]
    build, _ = costs(0)["materialized"]
    return min(forward.total(balance) for forward in forwards), build.total(balance)


def form(pattern: Sequence[Tensor] | None) -> Lists | str | None:
    """The form of the bases, as costs take it: :class:`Lists`, or ``"planes"``, ``"bits"``, ``"signs"`` or ``"seed"``.

    None if dense.
    """
    if pattern is None:
        return None
    if is_signs(pattern):
        return "signs"
    if is_seed(pattern):
        return "seed"
    if is_bits(pattern):
        return "bits"
    if is_planes(pattern):
        return "planes"
    lists = ListTensors(*pattern)
    return Lists(lists.columns.numel(), lists.b_indices.numel() / (lists.b_starts.numel() // 2))


def costs_of(call: LayerCall, form: Lists | str | None) -> dict[str, tuple[Cost, Cost]]:
    """Forward and backward cost of each strategy that can compute the call, whatever the `form` of the bases."""
    if form == "signs":
        return Hadamard(call).costs()
    if isinstance(form, Lists):
        return Sparse(call, form).costs()
    return Dense(call, form).costs()


def totals_of(
    T: int,
    in_features: int,
    out_features: int,
    n: int,
    r: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    device_type: str,
    *,
    form: Lists | str | None = None,
    **needs: bool,
) -> dict[str, tuple[int, int]]:
    """Cost forward and backward of the strategies that `auto` takes for this call. Arguments as for :func:`choose`."""
    # As numbers: see LayerCall.
    numbers = {name: int(value) for name, value in needs.items()}
    has_weight = int(weight_dtype is not None)
    call = LayerCall(T, in_features, out_features, n, r, dtype.itemsize, device_type, has_weight=has_weight, **numbers)
    options = costs_of(call, form)
    if not (weight_dtype == dtype and merges_exactly(dtype)):
        options.pop("merged", None)
    balance = _balance(device_type, dtype)
    return {name: (forward.total(balance), backward.total(balance)) for name, (forward, backward) in options.items()}
