"""Merged weights and those from before: they change places, and what raises in between gives them back.

A layer is :class:`randlora.layers.merging.Mergeable`, whose attributes say what is in its weight and what was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..distributed import zero3
from ..distributed.fsdp import is_sharded
from ..distributed.gathering import is_dtensor, split_as
from . import base_layer as base_layers
from . import offload, quantized
from .ordinary import keeps_its_weight

if TYPE_CHECKING:
    from .merging import Mergeable


@contextlib.contextmanager
def unmerged(layers: Iterable[Mergeable]) -> Iterator[None]:
    """Gives the base weights of these merged layers back; if that or the block raises, they are merged again."""
    layers = list(layers)
    for layer in layers:
        check_unmerge(layer)
    before = [(layer._merged_into, list(layer.merged_adapters)) for layer in layers]
    exchanged = 0
    kept: list[Tensor | tuple[nn.Parameter] | None] = []
    try:
        for layer in layers:
            _exchange(layer)
            exchanged += 1
        kept = [layer._unmerged_weight for layer in layers]
        yield
        for layer in layers:
            layer._unmerged_weight = layer._merged_into = None
            layer.merged_adapters.clear()
    except BaseException:
        for i, layer in enumerate(layers[:exchanged]):
            layer._unmerged_weight = kept[i] if kept else layer._unmerged_weight
            layer._merged_into, layer.merged_adapters[:] = before[i]
            _exchange(layer)
        raise


def check_unmerge(layer: Mergeable) -> None:
    """Raises ``ValueError`` where the layer's ``unmerge`` would; for a look at all layers before the first."""
    base, kept = layer.get_base_layer(), layer._unmerged_weight
    if kept is None:
        raise ValueError(NOT_KEPT)
    if is_sharded(layer):
        raise ValueError(
            f"{', '.join(layer.merged_adapters)} was merged before fully_shard, which puts the weight together for "
            "every call, so that what is taken out of it would be lost: unmerge before fully_shard"
        )
    if layer._merged_into is not None and layer._merged_into[0] is not base:
        raise ValueError(
            f"{', '.join(layer.merged_adapters)} was merged into a base layer that has been replaced by another, a "
            f"{base_layers.name_of(base)}: it cannot be taken out of that"
        )
    if not isinstance(kept, tuple):
        if quantized.is_quantized(base):
            raise ValueError(
                f"{', '.join(layer.merged_adapters)} was merged into a weight that has been quantised since: it cannot "
                "be taken out of that"
            )
        if not keeps_its_weight(base, layer.weight_name):
            raise ValueError(recomputed(base, layer.weight_name))
        offload.require_numbers(kept, "the base layer's weight as it was", "to give back")
        zero3.require_whole(getattr(base, layer.weight_name), "the base layer's weight", "to write over", writing=True)


def _exchange(layer: Mergeable) -> None:
    """Lets the merged weight and the kept one change places: it can be undone, and needs memory for one layer only."""
    base, kept = layer.get_base_layer(), layer._unmerged_weight
    assert kept is not None
    merged = (quantized.held_by(base),) if isinstance(kept, tuple) else copy_of_weight(layer)
    try:
        layer._unmerged_weight = merged
        if isinstance(kept, tuple):
            quantized.replace_weight(base, kept[0])
        else:
            put_weight(layer, kept)
    except BaseException:
        layer._unmerged_weight = kept
        if not isinstance(merged, tuple):
            put_weight(layer, merged)
        raise


def copy_of_weight(layer: Mergeable) -> Tensor:
    """A copy of an ordinary weight; of one that is offloaded, where it is: `put_weight` writes into no old memory."""
    base = layer.get_base_layer()
    weight = offload.read(base, layer.weight_name).detach()
    return weight.cpu() if offload.hooks(base) else weight.clone()


def put_weight(layer: Mergeable, value: Tensor) -> None:
    """Another value for an ordinary weight, wherever it is kept."""
    base, name = layer.get_base_layer(), layer.weight_name
    weight = getattr(base, name)
    # Inference tensors can be written in inference mode alone.
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        if not offload.hooks(base):
            # A parallel plan may have cut the weight after `value` was kept.
            weight.copy_(value if is_dtensor(value) else split_as(weight, value))
            return
        # What is brought in may be the very tensor that it is brought in from, which may be others' too.
        offload.write(base, name, value)
        if not weight.is_meta:
            weight.data = value.to(weight.device)


@contextlib.contextmanager
def merged_or_not(layers: Iterable[Mergeable]) -> Iterator[None]:
    """If the block, which merges adapters into some of `layers`, raises, all of them are as they were before it.

    The weights as they were come from what the layers keep; of layers that are merged already a copy is made.
    """
    before = [
        (layer, layer._unmerged_weight, layer._merged_into, list(layer.merged_adapters), _current(layer))
        for layer in layers
    ]
    try:
        yield
    except BaseException:
        with contextlib.ExitStack() as all_of_them:  # also where one of them raises
            for saved in reversed(before):
                all_of_them.callback(_restore, *saved)
        raise


def _restore(layer: Mergeable, kept: Any, into: Any, names: list[str], weight: Any) -> None:
    try:
        if isinstance(weight, tuple):
            quantized.replace_weight(layer.get_base_layer(), weight[0])
        elif isinstance(source := layer._unmerged_weight if weight is None else weight, Tensor):
            put_weight(layer, source)
    finally:
        layer._unmerged_weight, layer._merged_into, layer.merged_adapters[:] = kept, into, names


def _current(layer: Mergeable) -> Any:
    """What the layer's weight must be set to again: None where the layer will keep it itself."""
    if layer._is_quantized():
        return (quantized.held_by(layer.get_base_layer()),)
    return copy_of_weight(layer) if layer.merged else None


NOT_KEPT = "the weight as it was before merging was not kept (merge_and_unload with low_memory=True)"


def recomputed(base: nn.Module, name: str) -> str:
    """Why this layer cannot be merged into, and what to do."""
    what = "computed anew from others at every call, so that what is merged into it or taken out of it would be lost"
    way = "remove what computes it, for example with torch.nn.utils.prune.remove or remove_weight_norm"
    if torch.nn.utils.parametrize.is_parametrized(base, name):
        way = f"torch.nn.utils.parametrize.remove_parametrizations(layer.get_base_layer(), {name!r}) removes that"
    elif not base._forward_pre_hooks:
        what = "a tensor that no state dict holds"
        way = f"layer.get_base_layer().{name} = torch.nn.Parameter(layer.weight.detach()) makes it one"
    return f"the weight of this {type(base).__name__} is no parameter but {what}: {way}; nothing was changed"
