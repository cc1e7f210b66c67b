"""Which of the three ways to compute a layer is the cheapest: a small cost model, and `explain`, which prints it.

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
the time of one byte (:data:`BALANCE`). The strategy with the smallest sum is taken. ``merged`` is taken only where
the weight itself is fp32 or fp64 and so is the computation: in 16 bits, W + dW rounds away updates below half a unit
in the last place of W.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

STRATEGIES = ("factored", "materialized", "merged")

# Multiply-adds per byte of memory traffic, (device type, bytes per element): CPU cores reach about 35 G/s of them in
# fp32 against 5 GB/s each; an H100 400 T/s in 16 bits, 33 T/s in fp32, against 3 TB/s.
BALANCE = {("cpu", 8): 4.0, ("cpu", 4): 7.0, ("cpu", 2): 7.0, ("cuda", 8): 10.0, ("cuda", 4): 10.0, ("cuda", 2): 130.0}


@dataclass(frozen=True)
class Cost:
    """Of one call: multiply-adds forward and backward, bytes its temporaries take and bytes they move."""

    forward: int
    backward: int
    workspace: int
    traffic: int

    def total(self, balance: float) -> float:
        return self.forward + self.backward + balance * self.traffic


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
) -> dict[str, Cost]:
    """The cost of each strategy that can compute the call (no ``merged`` with dropout or without a base weight)."""
    m, M, P, e = min(in_features, out_features), max(in_features, out_features), n * r, element_bytes
    base = T * M * m if has_weight else 0
    base_backward = base if need_x else 0
    first, second = (P * m, P * M) if in_features <= out_features else (P * M, P * m)
    build = P * M * m
    backward = need_x or need_parameters
    scaled, dense, hidden, gradient = P * m * e, M * m * e, T * P * e, P * m * max(4, e)
    dropped = T * in_features * e * (1 + need_x + need_parameters) if dropout else 0

    # Backward of the factored form: dh (like the second product), dx from it, dS2; a tall layer also rebuilds h.
    rebuild = T * first if need_parameters and in_features > out_features else 0
    factored = Cost(
        forward=base + T * (first + second),
        backward=base_backward + backward * T * second + need_x * T * first + need_parameters * T * P * m + rebuild,
        workspace=scaled + hidden + need_parameters * gradient,
        traffic=2 * (1 + backward) * (scaled + hidden) + need_parameters * 2 * gradient + dropped,
    )
    with_dense = {
        "backward": base_backward + need_x * build + need_parameters * (T * M * m + build),
        "workspace": scaled + dense + need_parameters * gradient,
        "traffic": (1 + need_x) * 2 * (scaled + dense) + need_parameters * 2 * (dense + gradient) + dropped,
    }
    materialized = Cost(forward=base + T * M * m + build, **with_dense)
    materialized = Cost(
        materialized.forward, materialized.backward + need_x * T * M * m, materialized.workspace,
        materialized.traffic + 2 * T * (out_features + need_x * in_features) * e,
    )  # fmt: skip
    found = {"factored": factored, "materialized": materialized}
    if has_weight and not dropout:
        found["merged"] = Cost(forward=base + build, **with_dense)
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
) -> str:
    """The strategy with the smallest cost. `weight_dtype` None: there is no base weight to work with."""
    options = costs(T, in_features, out_features, n, r, dtype.itemsize, dropout=dropout,
                    has_weight=weight_dtype is not None, need_x=need_x, need_parameters=need_parameters)  # fmt: skip
    if not (weight_dtype == dtype and dtype in (torch.float32, torch.float64)):
        options.pop("merged", None)
    balance = BALANCE.get((device_type, dtype.itemsize), 10.0)
    best, least = "factored", None
    for name, cost in options.items():
        total = cost.total(balance)
        if least is None or total < least:
            best, least = name, total
    return best


def explain(layer: torch.nn.Module, tokens: int, training: bool = True) -> str:
    """Print, and return, what a :class:`randlora.Linear` would choose for a call with `tokens` tokens, and why.

    One line per active adapter and strategy: multiply-adds forward and backward, bytes of temporaries, and the model's
    total relative to the cheapest; `training` False counts a forward under ``no_grad``.
    """
    lines = []
    weight = layer.get_base_layer().weight
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    balance = BALANCE.get((weight.device.type, dtype.itemsize), 10.0)
    for adapter in layer.active_adapters:
        n, r = layer.num_bases[adapter], layer.r[adapter]
        dropout = training and getattr(layer.randlora_dropout[adapter], "p", 0.0) > 0
        shape = (tokens, layer.in_features, layer.out_features, n, r)
        needs = {"dropout": dropout, "need_x": training, "need_parameters": training}
        options = costs(*shape, dtype.itemsize, **needs)
        chosen = choose(*shape, dtype, weight.dtype, weight.device.type, **needs)
        forced = layer.strategy != "auto"
        least = min(cost.total(balance) for cost in options.values())
        lines.append(
            f"adapter {adapter!r}: {layer.in_features} -> {layer.out_features}, {n} bases of rank {r}, {tokens} "
            f"tokens, {str(dtype).removeprefix('torch.')} on {weight.device.type}, "
            f"{'training' if training else 'inference'}"
        )
        lines.append(f"  {'strategy':<13}{'forward':>12}{'backward':>12}{'temporaries':>14}{'cost':>8}")
        for name, cost in options.items():
            note = ""
            if name == (layer.strategy if forced else chosen):
                note = "  <- forced" if forced else "  <- chosen"
            elif name == "merged" and dtype.itemsize == 2:
                note = "  (only on request: 16 bits round small updates away)"
            lines.append(
                f"  {name:<13}{cost.forward / 1e6:>10.1f} M{cost.backward * training / 1e6:>10.1f} M"
                f"{cost.workspace / 2**20:>10.1f} MiB{cost.total(balance) / least:>8.2f}{note}"
            )
        kept = tokens * layer.in_features * dtype.itemsize if training else 0
        lines.append(
            f"  kept for backward: the input, {kept / 2**20:.1f} MiB (multiply-adds; cost relative to the best)"
        )
    text = "\n".join(lines)
    print(text)
    return text
