"""What cannot be done to a model that FSDP2 shards: it knows the parameters that there were when it was called."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..distributed.fsdp import hold_parts, is_sharded
from ..distributed.gathering import is_dtensor
from ..layers.attention import MultiheadAttention
from ..layers.randlora_layer import RandLoraLayer
from ..private_torch import is_put_together
from .adapter_plan import Plan
from .parts import adapted_layers


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raises ``ValueError`` for what cannot be added to a sharded model at all."""
    for name in plan.saved:
        if is_sharded(model.get_submodule(name)):
            raise ValueError(f"modules_to_save: a copy of {name!r} would not be sharded. {_BEFORE}")
    for name in plan.targets:
        for attention in (model.get_submodule(path) for path in (name, name.rpartition(".")[0])):
            whole = isinstance(attention, nn.MultiheadAttention) and not isinstance(attention, MultiheadAttention)
            if whole and is_sharded(attention):
                raise ValueError(
                    f"{name!r}: the weights of its attention are sharded, and would be taken apart. {_BEFORE}"
                )


def check_trained(model: nn.Module, adapter_names: Iterable[str]) -> None:
    """Raises ``ValueError`` for adapters that were added to a sharded model: FSDP2 would not reduce their gradients."""
    for path, layer in adapted_layers(model).items():
        for name in adapter_names:
            if name in layer.randlora_lambda and not _has_parts(layer, name) and is_sharded(layer):
                raise ValueError(
                    f"adapter {name!r} cannot be trained: it was added to {path!r} after fully_shard, which knows "
                    f"nothing of it, so that every rank would train another one. {_BEFORE} To compute with it only, "
                    "load it with is_trainable=False, and activate it with set_adapter(name, inference_mode=True)"
                )


def check_deleted(model: nn.Module, adapter_name: str) -> None:
    """Raises ``ValueError`` for adapters that FSDP2 shards: it would put their parameters into the model again."""
    for path, layer in adapted_layers(model).items():
        if adapter_name in layer.randlora_lambda and _has_parts(layer, adapter_name):
            raise ValueError(
                f"adapter {adapter_name!r} cannot be deleted: fully_shard holds its parameters in {path!r}, and puts "
                "them back at every call. Delete it before fully_shard, or activate others"
            )


def _has_parts(layer: RandLoraLayer, adapter_name: str) -> bool:
    """Whether FSDP2 shards this adapter, and not only what was there before it."""
    parts = layer.trained_parts()
    hold_parts(parts)
    return all(is_put_together(parameters) and is_dtensor(parameters[adapter_name]) for parameters in parts)


_BEFORE = "Add adapters before fully_shard."
