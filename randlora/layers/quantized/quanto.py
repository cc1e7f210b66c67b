"""optimum-quanto: linears whose weight is one of its tensors, as ``quantize`` and ``freeze`` leave them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from .kind import Kind, is_of_library


class Quanto(Kind):
    def recognises(self, base_layer: Any, held: Any) -> bool:
        return is_of_library(held if held is not None else getattr(base_layer, "weight", None), "optimum")

    def name(self, held: Any) -> str:
        return f"quanto's {held.qtype.name}"

    def dequantize(self, base_layer: Any, held: Any) -> Tensor:
        return held.detach().dequantize()

    def requantize(self, base_layer: Any, held: Any, weight: Tensor) -> nn.Parameter:
        tensors, kind = sys.modules["optimum.quanto.tensor"], held.qtype
        optimizer = getattr(base_layer, "optimizer", None)
        if optimizer is None:  # quanto's own choice
            optimizer = tensors.AbsmaxOptimizer() if kind.bits == 8 else tensors.MaxOptimizer()
        weight, group_size, shift = weight.to(held.dtype), getattr(held, "_group_size", None), None
        if isinstance(optimizer, tensors.SymmetricOptimizer):
            scale = optimizer(weight, qtype=kind, axis=0)
        else:
            scale, shift = optimizer(weight, qtype=kind, axis=0, group_size=group_size)
        quantised = tensors.quantize_weight(
            weight,
            qtype=kind,
            axis=0,
            scale=scale,
            shift=shift,
            group_size=group_size,
            activation_qtype=getattr(held, "activation_qtype", None),
        )
        return nn.Parameter(quantised, requires_grad=False)
