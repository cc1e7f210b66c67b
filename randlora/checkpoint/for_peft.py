"""What PEFT makes of an adapter: whether it computes the same, and how to say which layers are meant."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from ..bases.definition import bases_for_full_rank
from ..bases.random_bases import RandomBases
from ..config import RandLoraConfig
from ..layers.attention import MultiheadAttention
from ..layers.randlora_layer import RandLoraLayer
from ..model.targets import peft_dims
from ..names import plain_name


def drawn_dims(config: RandLoraConfig, layers: Mapping[str, RandLoraLayer]) -> tuple[int, int, int]:
    """``(max_dim, min_dim, num_bases)`` of the bases that PEFT allocates for these layers."""
    max_dim, min_dim = peft_dims([(layer.in_features, layer.out_features) for layer in layers.values()])
    return max_dim, min_dim, bases_for_full_rank(min_dim, config.r)


def misread(
    model: nn.Module,
    config: RandLoraConfig,
    layers: Mapping[str, RandLoraLayer],
    bases: RandomBases,
    drawn: tuple[int, int, int],
    with_bases: bool,
) -> str:
    """Why PEFT would compute something else with this adapter, or an empty string."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for path, layer in layers.items():
        if layer.num_experts is not None:
            return f"{path} is the weight of fused experts, and PEFT's RandLoRA has no target_parameters"
        if isinstance(model.get_submodule(path.rpartition(".")[0]), MultiheadAttention):
            return f"{path} belongs to a torch.nn.MultiheadAttention, which PEFT's RandLoRA does not support"
        if len(known := names[id(layer)]) > 1:
            return f"{' and '.join(known)} are one layer, of which PEFT would adapt the first use only"
        n = bases_for_full_rank(min(layer.in_features, layer.out_features), config.r)
        if config.num_bases not in (None, n):
            return f"num_bases={config.num_bases}, where PEFT always takes {n} at {path}"
    has = bases.max_dim, bases.min_dim, bases.num_bases
    if not with_bases and (bases.prng != "peft" or has != drawn):
        return f"its bases (prng={bases.prng!r}) are not those that PEFT draws: it needs save_projection=True"
    if with_bases and bases.prng != "philox" and any(a < b for a, b in zip(has, drawn, strict=True)):
        return f"its bases, (max_dim, min_dim, num_bases) = {has}, are smaller than PEFT's for these layers, {drawn}"
    return ""


def exact_targets(model: nn.Module, layers: Mapping[str, RandLoraLayer]) -> dict[str, Any]:
    """Fields of the config that select exactly these layers, by names or, if those match others too, by a pattern."""
    targets: list[str] = []
    for path, layer in layers.items():
        if layer.num_experts is not None:
            continue  # target_parameters names it
        parent = path.rpartition(".")[0]
        attention = model.get_submodule(parent)
        whole = isinstance(attention, MultiheadAttention) and any(
            f"{parent}.{part}" in layers for part in ("q_proj", "k_proj", "v_proj")
        )
        target = plain_name(parent if whole else path)
        if target not in targets:
            targets.append(target)
    endings = tuple(f".{target}" for target in targets)
    names = (plain_name(name) for name, _ in model.named_modules())
    selected: list[str] | str = targets
    if any(name not in targets and name.endswith(endings) for name in names):
        selected = "(?:" + "|".join(map(re.escape, targets)) + ")"
    return {"target_modules": selected, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
