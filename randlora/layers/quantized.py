"""Quantised base layers: bitsandbytes' 8-bit and 4-bit linears, and linears whose weight is a torchao tensor.

A quantised base changes two things only: how its product is computed (:func:`product`), and how a weight is read and
written for merging (:func:`dequantize`, :func:`requantize`, :func:`replace_weight`). Neither library is imported here
before a layer of its own turns up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .quantized_kinds import Bnb4bit, StraightThrough, TorchAO, kind_of, require_kind


def is_quantized(base_layer: nn.Module) -> bool:
    """Whether the layer is a bitsandbytes ``Linear8bitLt`` or ``Linear4bit``, or has a torchao tensor as its weight."""
    return kind_of(base_layer) is not None


def dequantize(base_layer: nn.Module, parameter: nn.Parameter | None = None) -> Tensor:
    """What the quantised weight stands for, ``[out, in]`` in fp32, a new tensor; nothing in the layer changes.

    Args:
        parameter: one that was taken from this layer with :func:`replace_weight`; default: its present weight.

    Raises:
        TypeError: the layer is not quantised. ValueError: a bitsandbytes layer that has not quantised its weight yet.
    """
    kind = require_kind(base_layer, parameter)
    with torch.no_grad():
        return kind.dequantize(base_layer, base_layer.weight if parameter is None else parameter).float()


def requantize(base_layer: nn.Module, weight: Tensor, parameter: nn.Parameter | None = None) -> nn.Parameter:
    """`weight` ``[out, in]`` quantised with the kind and settings of the layer's weight, on its device; not assigned.

    A torchao weight that does not tell how it was quantised, which is one of no class that is listed in
    :data:`randlora.layers.quantized_kinds.TORCHAO_KINDS`, gives an ordinary parameter in its dtype, with a warning.

    Args:
        parameter: whose settings to take; default: those of the layer's present weight.

    Raises:
        TypeError, ValueError: as for :func:`dequantize`; ValueError for a weight of another shape.
    """
    kind = require_kind(base_layer, parameter)
    shape = (base_layer.out_features, base_layer.in_features)
    if tuple(weight.shape) != shape:
        raise ValueError(f"weight must have shape [out, in] = {list(shape)}, got {list(weight.shape)}")
    old = base_layer.weight if parameter is None else parameter
    with torch.no_grad():
        return kind.requantize(base_layer, old, weight.detach().to(old.device, torch.float32).contiguous())


def replace_weight(base_layer: nn.Module, parameter: nn.Parameter) -> nn.Parameter:
    """Give the layer another weight, from :func:`requantize` or from an earlier call; returns the one it had.

    What bitsandbytes keeps beside a weight goes with it, in both directions, and graphs that were recorded before still
    differentiate through the weight they were recorded with.
    """
    kind = kind_of(base_layer)
    old = base_layer.weight
    if kind is not None:
        kind.before_replacing(base_layer, old)
    base_layer.weight = parameter
    if kind is not None:
        kind.after_replacing(base_layer, parameter)
    return old


def product(base_layer: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    """``base_layer(x, ...)`` for any base layer, with the gradient for `x` that its weight stands for.

    torchao's linears with quantised activations pass no gradient on at all, and those without keep a float copy of the
    weight for backward. Here the gradient is that of the dequantised weight (straight through the rounding of the
    activations), which is dequantised again in backward.
    """
    if torch.is_grad_enabled() and x.requires_grad and kind_of(base_layer) is TorchAO:
        return StraightThrough.apply(base_layer(x.detach(), *args, **kwargs), x, base_layer.weight)
    return base_layer(x, *args, **kwargs)


def prepare(base_layer: nn.Module) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight for CPU inference, and undo it where it happened.

    Its first call in eval mode on a CPU with AVX512-BF16 rewrites the weight in place, rounds its scales to bf16, and
    has no gradient from then on; sizes that are no multiples of its blocks raise or lose their scales.
    """
    if kind_of(base_layer) is not Bnb4bit:
        return
    weight, state = base_layer.weight, Bnb4bit.state(base_layer, base_layer.weight)
    if getattr(state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = Bnb4bit.unpacked(weight, state)
        base_layer.quant_state = weight.quant_state
    if hasattr(base_layer, "support_avx512bf16_for_cpu"):
        base_layer.support_avx512bf16_for_cpu = False


def merged_parameter(
    base_layer: nn.Module, update: Tensor, parameter: nn.Parameter | None = None
) -> tuple[nn.Parameter, Tensor, str | None]:
    """``W + update`` quantised again: the parameter, the numbers it stands for (fp32), and what to warn of, or None.

    The update ``[out, in]`` is added to what `parameter` (default: the layer's weight) stands for in fp32, and rounded
    once. An update of zeros gives the very same parameter back.
    """
    old = base_layer.weight if parameter is None else parameter
    weight = dequantize(base_layer, old)
    if not update.any():
        return old, weight, None
    exact = weight + update.to(weight)
    new = requantize(base_layer, exact, old)
    kind = kind_of(base_layer, new)
    if kind is None:
        return new, new.detach(), None  # requantize has warned
    got = dequantize(base_layer, new)
    error = (torch.linalg.vector_norm(got - exact) / torch.linalg.vector_norm(update)).item()
    loss = f"merging into {kind.name(new)} weights rounds them again: relative error of the update {error:.2g}"
    return new, got, loss


def moved(fn: Callable[[Tensor], Tensor], parameter: nn.Parameter) -> nn.Parameter:
    """`fn` of ``nn.Module._apply`` applied to a parameter that is in no module."""
    result = fn(parameter)
    if getattr(result, "SCB", parameter) is None:  # bitsandbytes moves the scales of 8-bit weights to devices only
        result.SCB = parameter.SCB
    return result if isinstance(result, nn.Parameter) else nn.Parameter(result, requires_grad=False)
