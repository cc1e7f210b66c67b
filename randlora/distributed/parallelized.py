"""Layers that a parallel plan may have cut over ranks: questions that import nothing of ``torch.distributed``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..private_torch import was_distributed
from .gathering import is_dtensor


def distributed_weight(base_layer: nn.Module) -> Tensor | None:
    """The weight of a layer, where it is a DTensor."""
    weight = base_layer._parameters.get("weight")
    return weight if is_dtensor(weight) else None


def cut_by_a_plan(base_layer: nn.Module) -> bool:
    """Whether ``parallelize_module`` or transformers has cut an ordinary layer over ranks, and nobody did more to it.

    What they put around the layer's product brings its input and its output into layouts.
    """
    if type(base_layer) is not nn.Linear or distributed_weight(base_layer) is None:
        return False
    hooks, replaced = len(base_layer._forward_pre_hooks) + len(base_layer._forward_hooks), "forward" in vars(base_layer)
    if was_distributed(base_layer):
        return hooks <= 2 and not replaced
    return not hooks and (not replaced or has_plan_around(base_layer))


def has_plan_around(module: nn.Module) -> bool:
    """Whether transformers has put its parallel plan around the forward of this very module."""
    return "_is_hooked" in vars(module) and "forward" in vars(module)


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers are finite; of a DTensor, on every rank, each of which must ask."""
    if not is_dtensor(tensor):
        return bool(torch.isfinite(tensor).all())
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    finite = torch.isfinite(tensor.to_local()).all().int()
    for group in tensor.device_mesh.get_all_groups():
        torch.distributed.all_reduce(finite, torch.distributed.ReduceOp.MIN, group=group)
    return bool(finite)
