"""``randlora.explain``: what a layer's strategies cost, and which one it takes."""

from __future__ import annotations

from typing import Any

from torch import nn

from . import planner
from .bases import hadamard
from .checks import require_int
from .costs.strategies import LayerCall
from .layers.experts_linear import ExpertsLinear
from .layers.linear import Linear
from .layers.randlora_layer import RandLoraLayer
from .ops.pattern import SignTensors


def explain(layer: Linear | ExpertsLinear, tokens: int, training: bool = True) -> str:
    """Print, and return, what a :class:`randlora.Linear` would choose for a call with `tokens` tokens, and why.

    Of a :class:`randlora.Experts` it takes one part, such as ``experts.down_proj``, and the tokens of one expert.

    One line per active adapter, pass and strategy: multiply-adds, bytes of temporaries, and the modelled cost relative
    to the cheapest; `training` False counts a forward under ``no_grad``. For Hadamard bases also the group width, and
    what rank it costs this layer. TypeError, ValueError: `layer` is no adapted layer, `tokens` no number of tokens.
    """
    if not isinstance(layer, RandLoraLayer):
        parts = layer.named_modules() if isinstance(layer, nn.Module) else ()
        inside = [name for name, module in parts if isinstance(module, RandLoraLayer)][:3]
        raise TypeError(
            f"layer must be an adapted layer, such as randlora.Linear, got {type(layer).__name__}"
            + (f": take one of those inside it, such as {', '.join(inside)}" if inside else "")
        )
    require_int("tokens", tokens, 0)
    lines = []
    dtype, device = layer.compute_dtype_and_device()
    balance = planner.BALANCE.get((device.type, dtype.itemsize), 10)
    for adapter in layer.active_adapters:
        n, r = layer.num_bases[adapter], layer.r[adapter]
        dropout = training and getattr(layer.randlora_dropout[adapter], "p", 0.0) > 0
        shape = (tokens, layer.in_features, layer.out_features, n, r)
        needs: dict[str, Any] = {"dropout": int(dropout), "need_x": int(training), "need_parameters": int(training)}
        pattern = layer.pattern(adapter)
        bases = planner.form(pattern)
        plain = layer.base_is_plain()  # a quantised base layer computes its product itself
        call = LayerCall(*shape, dtype.itemsize, device.type, has_weight=int(plain), **needs)
        options = planner.costs_of(call, bases)
        chosen = planner.choose(*shape, dtype, dtype if plain else None, device.type, **needs, form=bases)
        strategy = layer.strategy if plain else planner.without_weight(layer.strategy)
        forced = strategy != "auto"
        if forced:
            chosen = strategy, strategy
        lines.append(
            f"adapter {adapter!r}: {layer.in_features} -> {layer.out_features}, {n} bases of rank {r}, {tokens} "
            f"tokens, {str(dtype).removeprefix('torch.')} on {device.type}, "
            f"{'training' if training else 'inference'}"
            + (f", one of {layer.num_experts} experts" if layer.num_experts is not None else "")
        )
        if bases == "signs" and pattern is not None:
            lines.append(
                "  " + _groups(min(layer.in_features, layer.out_features), n, r, len(SignTensors(*pattern).width))
            )
        for which, direction in enumerate(("forward", "backward") if training else ("forward",)):
            lines.append(f"  {direction:<13}{'multiply-adds':>15}{'temporaries':>15}{'cost':>7}")
            least = min(cost[which].total(balance) for cost in options.values()) or 1
            for name, cost in options.items():
                note = ""
                if name == chosen[which]:
                    note = "  <- forced" if forced else "  <- chosen"
                elif name == "merged" and dtype.itemsize == 2:
                    note = "  (only on request: 16 bits round small updates away)"
                lines.append(
                    f"    {name:<13}{cost[which].multiply_adds / 1e6:>11.1f} M"
                    f"{cost[which].workspace / 2**20:>11.1f} MiB{cost[which].total(balance) / least:>7.2f}{note}"
                )
        if isinstance(layer, ExpertsLinear) and len(layer.active_adapters) == 1 and not layer.weight.requires_grad:
            counts = [tokens] * (layer.num_experts or 0)
            if layer.takes_all_at_once(adapter, counts, dtype, device.type, bases, training, training, dropout):
                lines.append("  all experts with so many tokens: at once, factored, with dense bases and grouped_mm")
        kept = tokens * layer.in_features * dtype.itemsize if training else 0
        lines.append(
            f"  kept for backward: the input, {kept / 2**20:.1f} MiB (multiply-adds; cost relative to the best)"
        )
    text = "\n".join(lines)
    print(text)
    return text


def _groups(m: int, n: int, r: int, width: int) -> str:
    """What the group width means for a layer with this smaller dimension."""
    said = f"hadamard bases in groups of width {width}"
    if lost := hadamard.lost_rank(m, n, r, width):
        own = hadamard.group_width([(m, n)], r)
        said += f", which cost this layer rank: {min(m, n * r) - lost} in place of {min(m, n * r)}" + (
            f" (bases of its own would have width {own})" if own < width else ""
        )
    return said
