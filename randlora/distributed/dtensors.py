"""Whether a tensor is a DTensor, asked without importing ``torch.distributed`` for it."""

from __future__ import annotations

import sys

from torch import Tensor, nn


def is_dtensor(value: object) -> bool:
    """Whether it is a ``torch.distributed.tensor.DTensor``, of which there are none before that is imported."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def distributed_weight(base_layer: nn.Module) -> Tensor | None:
    """The weight of a layer, where it is a DTensor."""
    weight = base_layer._parameters.get("weight")
    return weight if is_dtensor(weight) else None
