"""The gradient for the input of a layer whose own is missing, or is not that of the weight it had in the forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...private_torch import unsafe_view
from .kind import Held, Kind


class StraightThrough(torch.autograd.Function):
    """``apply(y, x, kind, base_layer, held)`` is `y`, the layer's output for x without its graph.

    The gradient for x is ``g @ dequantised weight``, dequantised in backward, and g for y (its bias).
    """

    @staticmethod
    def forward(y: Tensor, x: Tensor, kind: Kind, base_layer: Any, held: Held) -> Tensor:
        return unsafe_view(y, y.shape)  # not a view, which in-place operations could not touch

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Kind, Any, Held], output: Tensor) -> None:
        _, x, ctx.kind, ctx.base_layer, held = inputs
        ctx.dtype = x.dtype
        ctx.held = None if isinstance(held, Tensor) else held
        if ctx.held is None:
            ctx.save_for_backward(held)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        d_x = None
        if ctx.needs_input_grad[1]:
            held = ctx.saved_tensors[0] if ctx.held is None else ctx.held
            d_x = (grad @ ctx.kind.in_dtype(ctx.base_layer, held, grad.dtype)).to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, d_x, None, None, None
