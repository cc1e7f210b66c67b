"""Ordinary layers, ``nn.Linear`` and transformers' ``Conv1D``, and whether one does just what its class does."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from ..private_torch import FakeTensor


def conv1d_types() -> tuple[type, ...]:
    """transformers' Conv1D, where transformers is in use at all; importing it here would be slow for those without."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def has_own_forward(base_layer: nn.Module) -> bool:
    """Whether its class has another forward than ``nn.Linear`` and ``Conv1D``."""
    classes: tuple[Any, ...] = (nn.Linear, *conv1d_types())
    forwards = (cls.forward for cls in classes if isinstance(base_layer, cls))
    return type(base_layer).forward not in forwards


def forward_is_replaced(base_layer: nn.Module) -> bool:
    """Whether the instance has another forward than its class.

    accelerate's device map gives it one, and leaves the class's method there when it is removed.
    """
    forward = vars(base_layer).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(base_layer).forward


def own(module: nn.Module, name: str) -> Any:
    """``getattr(module, name)``, but fast for parameters: ``nn.Module`` looks for them last."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_plain(base: nn.Module) -> bool:
    """Whether a layer does nothing but its product with an ordinary weight."""
    return plain_weight(base) is not None


def plain_weight(base: nn.Module) -> Tensor | None:
    """The weight of such a layer, None of any other."""
    cls = type(base)
    if not (cls is nn.Linear or cls in conv1d_types()):
        return None
    if base._forward_hooks or base._forward_pre_hooks or forward_is_replaced(base):
        return None
    weight = own(base, "weight")
    # torchao's quantised weights are subclasses; torch.export puts fake tensors in the place of all parameters.
    return weight if type(weight) in (nn.Parameter, Tensor, FakeTensor) else None


def tensor_weight(base_layer: nn.Module, name: str = "weight") -> Tensor | None:
    """The weight, unless it is no tensor: that of PyTorch's own quantised layers is a method, others have none."""
    weight = getattr(base_layer, name, None)
    return weight if isinstance(weight, Tensor) else None


def keeps_its_weight(base_layer: nn.Module, name: str = "weight") -> bool:
    """Whether the weight is the same tensor from call to call, not one that is computed anew."""
    parameters, buffers = base_layer._parameters, base_layer._buffers
    return isinstance(parameters.get(name), nn.Parameter) or buffers.get(name) is not None


def has_weight_method(base_layer: nn.Module) -> bool:
    """Whether it is one of PyTorch's own quantised layers, which have no tensor as their weight."""
    return callable(getattr(base_layer, "weight", None)) and tensor_weight(base_layer) is None
