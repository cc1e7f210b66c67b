"""What is asked of a kind of quantised layer; the files beside this one answer for a library each.

The libraries are taken from ``sys.modules``: where there is a layer of theirs, they are loaded. Their layers and
weights are ``Any`` here: only they know what attributes these have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# A quantised weight as a layer has it: the parameter ``weight``, or the layer's attributes of which it consists.
Held = Any


class Kind:
    """How a library's layers hold their weights. Without state: the layer and the weight are arguments."""

    #: Whether the layer's own product gives its input the gradient: that of the weight at the time of the call, without
    #: a float copy of it being kept.
    has_gradient = True
    #: Whether what is done with the weight is known for every layer of the kind, or must be tried before merging.
    is_sure = True
    #: The attributes of a layer that are its weight.
    parts: tuple[str, ...] = ("weight",)

    def recognises(self, base_layer: Any, held: Held) -> bool:
        """Whether it is a layer of this kind, if `held` (None: what it has) is its weight."""
        raise NotImplementedError

    def name(self, held: Held) -> str:
        """What merging says that it is."""
        raise NotImplementedError

    def dequantize(self, base_layer: Any, held: Held) -> Tensor:
        """The numbers that the layer computes with, a new tensor in the weight's layout."""
        raise NotImplementedError

    def in_dtype(self, base_layer: Any, held: Held, dtype: torch.dtype) -> Tensor:
        """The same numbers in a dtype, for a product."""
        return self.dequantize(base_layer, held).to(dtype)

    def requantize(self, base_layer: Any, held: Held, weight: Tensor) -> Held:
        """`weight`, fp32, quantised with the settings of `held`. Raises ``ValueError`` where these are not known."""
        raise NotImplementedError

    def shape(self, base_layer: Any, held: Held) -> tuple[int, ...]:
        return base_layer.out_features, base_layer.in_features

    def held(self, base_layer: Any) -> Held:
        if self.parts == ("weight",):
            return base_layer.weight
        return {name: getattr(base_layer, name) for name in self.parts}

    def put(self, base_layer: Any, held: Held) -> None:
        """Let the layer have this weight."""
        for name, value in held.items() if isinstance(held, dict) else (("weight", held),):
            setattr(base_layer, name, value)


def device_of(held: Held) -> Any:
    tensors = held.values() if isinstance(held, dict) else (held,)
    return next(value.device for value in tensors if isinstance(value, Tensor))


def moved(fn: Callable[[Tensor], Any], held: Held) -> Held:
    """`fn` of ``nn.Module._apply`` applied to the parameters of a weight that is in no module."""
    if isinstance(held, dict):
        return {name: moved(fn, part) if isinstance(part, nn.Parameter) else part for name, part in held.items()}
    result = fn(held)
    if getattr(result, "SCB", held) is None:  # bitsandbytes moves the scales of 8-bit weights to devices only
        result.SCB = held.SCB
    return result if isinstance(result, nn.Parameter) else nn.Parameter(result, requires_grad=False)


def is_of_library(weight: Any, library: str) -> bool:
    """Whether a tensor is of a class of this library's, or derived from one."""
    if type(weight) in (Tensor, nn.Parameter):
        return False
    return any(cls.__module__.partition(".")[0] == library for cls in type(weight).__mro__)
