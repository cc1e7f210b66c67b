"""A training step of a model as :func:`randlora.estimate` counts it: its layers, their calls, and what is beside."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..bases.definition import bases_for_full_rank
from ..checkpoint import biases
from ..checkpoint.layout import PREFIX
from ..distributed.zero3 import shape_of
from ..dtypes import at_least_fp32
from ..layers.linears import dtype_and_device
from ..layers.ordinary import is_plain
from ..layers.randlora_layer import RandLoraLayer
from ..model.adapter_plan import Plan
from .trial_call import Call

Shapes = dict[str, tuple[torch.dtype, Sequence[int]]]  # of named tensors


@dataclass(frozen=True)
class Layer:
    """A linear layer that gets parameters. Its product is in `dtype`, its input comes in `input_dtype`.

    `weight_dtype` None: the base layer computes its product itself. `calls` None: nobody has seen it called.
    `experts`: it is as many layers, and each token goes through `top_k` of them; 0: it is one.
    """

    name: str
    in_features: int
    out_features: int
    num_bases: int
    parameter_dtype: torch.dtype
    dtype: torch.dtype
    input_dtype: torch.dtype
    weight_dtype: torch.dtype | None
    calls: list[Call] | None = None
    experts: int = 0
    top_k: int = 0


@dataclass(frozen=True)
class Step:
    """A training step: `tokens` tokens through `layers` on `device`, with dense bases that are kept, or made anew."""

    tokens: int
    device: torch.device
    layers: list[Layer]
    keep_bases: bool = True

    @property
    def dtype(self) -> torch.dtype:
        """Of most layers' products."""
        return Counter(layer.dtype for layer in self.layers).most_common(1)[0][0]

    def calls(self) -> Iterator[tuple[Layer, Call]]:
        """A call that nobody has seen gets an input of its own, which needs a gradient."""
        for i, layer in enumerate(self.layers):
            for call in layer.calls or [Call(-1 - i, False, True)]:
                yield layer, call

    def rows(self, layer: Layer) -> int:
        """Tokens that go through a layer in one call; those of experts are counted once for each expert."""
        return self.tokens * (layer.top_k if layer.experts else 1)

    def products(self, layer: Layer) -> Iterator[tuple[int, int]]:
        """How many tokens are multiplied at once, and how often: experts are taken to get equally many."""
        each, more = divmod(self.rows(layer), layer.experts or 1)
        for tokens, count in ((each, (layer.experts or 1) - more), (each + 1, more)):
            if count and (tokens or not layer.experts):
                yield tokens, count


@dataclass(frozen=True)
class Beside:
    """What an adapter trains, and what its file holds, beside the parameters of layers: biases, whole modules."""

    trained: Shapes
    written: Shapes


def layers_of(model: nn.Module, plan: Plan, autocast: torch.dtype | None) -> list[Layer]:
    modules = dict(model.named_modules(remove_duplicate=False))
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    found = []
    for name, sizes in plan.slots.items():
        parent = modules[name.rpartition(".")[0]]
        fused = parent if name in plan.num_experts else None
        attention = isinstance(parent, nn.MultiheadAttention)  # it is taken apart into plain layers
        if fused is not None:
            told: torch.dtype | None = fused.get_parameter(name.rpartition(".")[2]).dtype
            plain = True
        else:
            module = parent.out_proj if attention else modules[name]
            plain = attention or is_plain(module)
            told, _ = dtype_and_device(module.get_base_layer() if isinstance(module, RandLoraLayer) else module)
        own = usual if told is None else told
        dtype = own if autocast is None or own == torch.float64 else autocast
        parameters = at_least_fp32(torch.float32 if told is None else told)
        found.append(Layer(name, *sizes, plan.num_bases(name), parameters, dtype, own, own if plain else None))
        if fused is not None:
            found[-1] = replace(found[-1], experts=plan.num_experts[name], top_k=top_k_of(fused))
    return found


def top_k_of(experts: Any) -> int:
    """How many experts a token goes through; where a model's config does not tell, all of them."""
    told = getattr(getattr(experts, "config", None), "num_experts_per_tok", None)
    return told if isinstance(told, int) else int(experts.num_experts)


def beside(model: nn.Module, plan: Plan) -> Beside:
    trained: Shapes = {
        f"{PREFIX}{name}": (bias.dtype, shape_of(bias))
        for name, bias in biases.trained(model, plan.config.bias, plan.slots, plan.saved).items()
    }
    written = dict(trained)
    for name in plan.saved:
        module = model.get_submodule(name)
        for key, value in module.named_parameters():
            if value.is_floating_point():
                trained[f"{PREFIX}{name}.{key}"] = value.dtype, shape_of(value)
        for key, value in module.state_dict(keep_vars=True).items():
            written[f"{PREFIX}{name}.{key}"] = value.dtype, shape_of(value)
    return Beside(trained, written)


def writes_projections(model: nn.Module, plan: Plan) -> bool:
    """Whether the file gets the bases: if the config says so, and PEFT can use the adapter (checkpoint.for_peft)."""
    if plan.num_experts:
        return False
    modules = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(map(id, modules.values()))
    for name, sizes in plan.slots.items():
        attention = isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)
        if (
            attention
            or uses[id(modules[name])] > 1
            or plan.num_bases(name) != bases_for_full_rank(min(sizes), plan.config.r)
        ):
            return False
    return plan.config.save_projection
