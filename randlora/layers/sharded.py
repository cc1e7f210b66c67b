"""Layers that FSDP2 shards: it knows the adapters that they had when it was called, and no others."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..distributed.fsdp import hold_parts, is_sharded
from ..distributed.gathering import is_dtensor
from ..private_torch import is_put_together


def check_trained(layer: nn.Module, parts: Iterable[nn.ParameterDict], adapter_names: Iterable[str]) -> None:
    """Raises ``ValueError`` for adapters of `layer` whose gradients FSDP2 would not reduce.

    `parts`: the layer's ``randlora_lambda`` and ``randlora_gamma``.
    """
    if not is_sharded(layer):
        return
    parts = tuple(parts)
    for name in adapter_names:
        if not _has_parts(parts, name):
            raise ValueError(
                f"adapter {name!r} cannot be trained: it was added after fully_shard, which knows nothing of it, so "
                "that every rank would train another one. Add adapters before fully_shard. To compute with it only, "
                "load it with is_trainable=False, and activate it with set_adapter(name, inference_mode=True)"
            )


def check_deleted(parts: Iterable[nn.ParameterDict], adapter_name: str) -> None:
    """Raises ``ValueError`` for an adapter that FSDP2 shards: it would put the parameters into the layer again."""
    if _has_parts(parts, adapter_name):
        raise ValueError(
            f"adapter {adapter_name!r} cannot be deleted: fully_shard holds its parameters, and puts them back at "
            "every call. Delete it before fully_shard, or activate others"
        )


def _has_parts(parts: Iterable[nn.ParameterDict], adapter_name: str) -> bool:
    """Whether FSDP2 shards this adapter, and not only others."""
    parts = tuple(parts)
    hold_parts(parts)
    return all(is_put_together(parameters) and is_dtensor(parameters[adapter_name]) for parameters in parts)
