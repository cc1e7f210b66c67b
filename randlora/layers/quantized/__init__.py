"""Base layers that do not hold their weight as numbers: how it is read as such, and written when adapters are merged.

Such a base changes two things only: how its product is computed (:func:`product`), and how a weight is read and written
for merging (:func:`dequantize`, :func:`requantize`, :func:`replace_weight`). No library is imported here before a layer
of its own turns up. A weight is passed around as its kind holds it (:class:`randlora.layers.quantized.kind.Kind`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..outputs import apart, together
from .ao import TorchAO
from .bnb import Bnb4bit, Bnb8bit
from .fp8 import Cast, FP8Linear
from .hqq import Hqq
from .kind import Held, Kind, device_of
from .kind import moved as moved
from .quanto import Quanto
from .straight_through import StraightThrough

KINDS: tuple[Kind, ...] = (Bnb4bit(), Bnb8bit(), Hqq(), FP8Linear(), Cast(), Quanto(), TorchAO())


def kind_of(base_layer: nn.Module, held: Held = None) -> Kind | None:
    """The kind of a layer, or of one that has `held` as its weight; None for one that is not quantised."""
    return next((kind for kind in KINDS if kind.recognises(base_layer, held)), None)


def is_quantized(base_layer: nn.Module) -> bool:
    """Whether the weight is of one of :data:`KINDS`: it can be read as numbers, and merged into."""
    return kind_of(base_layer) is not None


def held_by(base_layer: Any) -> Held:
    """The layer's weight, as :func:`replace_weight` takes it back."""
    kind = kind_of(base_layer)
    return base_layer.weight if kind is None else kind.held(base_layer)


def dequantize(base_layer: Any, held: Held = None) -> Tensor:
    """What the quantised weight stands for, in the weight's layout and fp32, a new tensor; the layer does not change.

    Args:
        held: a weight that was taken from this layer with :func:`replace_weight`; default: its present one.

    Raises:
        TypeError: the layer is not quantised. ValueError: a layer that has not quantised its weight yet.
    """
    kind = require_kind(base_layer, held)
    with torch.no_grad():
        return kind.dequantize(base_layer, kind.held(base_layer) if held is None else held).float()


def requantize(base_layer: Any, weight: Tensor, held: Held = None) -> Held:
    """`weight` quantised with the kind and settings of the layer's, on its device; not given to the layer.

    A torchao weight that does not tell how it was quantised, which is one of no class that is listed in
    :data:`randlora.layers.quantized.ao.TORCHAO_KINDS`, gives an ordinary parameter in its dtype, with a warning.

    Args:
        weight: in the weight's layout. held: whose settings to take; default: those of the layer's present weight.

    Raises:
        TypeError, ValueError: as for :func:`dequantize`; ValueError for a weight of another shape.
    """
    kind = require_kind(base_layer, held)
    old = kind.held(base_layer) if held is None else held
    if tuple(weight.shape) != (shape := kind.shape(base_layer, old)):
        raise ValueError(f"weight must have shape [out, in] = {list(shape)}, got {list(weight.shape)}")
    with torch.no_grad():
        return kind.requantize(base_layer, old, weight.detach().to(device_of(old), torch.float32).contiguous())


def replace_weight(base_layer: Any, held: Held) -> Held:
    """Give the layer another weight, from :func:`requantize` or from an earlier call; returns the one it had.

    What bitsandbytes keeps beside a weight goes with it, in both directions, and graphs that were recorded before still
    differentiate through the weight they were recorded with.
    """
    kind = kind_of(base_layer)
    if kind is not None:
        old = kind.held(base_layer)
        kind.put(base_layer, held)
    else:  # one that was cast or merged into an ordinary weight
        old = {name: getattr(base_layer, name) for name in held} if isinstance(held, dict) else base_layer.weight
        Kind().put(base_layer, held)
    return old


def product(base_layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """``base_layer(x, ...)`` for any base layer, with the gradient for `x` that its weight stands for.

    torchao's linears with quantised activations pass no gradient on at all, those without keep a float copy of the
    weight for backward, and HQQ's take whatever weight the layer has by then. Here the gradient is that of the
    dequantised weight (straight through the rounding of activations), which is dequantised again in backward.
    """
    if torch.is_grad_enabled() and x.requires_grad and (kind := kind_of(base_layer)) and not kind.has_gradient:
        result, rest = apart(base_layer(x.detach(), *args, **kwargs))
        return together(StraightThrough.apply(result, x, kind, base_layer, kind.held(base_layer)), rest)
    return base_layer(x, *args, **kwargs)


def prepare(base_layer: Any) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight for CPU inference, and undo it where it happened.

    Its first call in eval mode on a CPU with AVX512-BF16 rewrites the weight in place, rounds its scales to bf16, and
    has no gradient from then on; sizes that are no multiples of its blocks raise or lose their scales.
    """
    kind = kind_of(base_layer)
    if not isinstance(kind, Bnb4bit):
        return
    weight, state = base_layer.weight, kind.state(base_layer, base_layer.weight)
    if getattr(state, "packing_format_for_cpu", False):
        weight.data, weight.quant_state = kind.unpacked(weight, state)
        base_layer.quant_state = weight.quant_state
    if hasattr(base_layer, "support_avx512bf16_for_cpu"):
        base_layer.support_avx512bf16_for_cpu = False


def merged_weight(base_layer: Any, update: Tensor, held: Held = None) -> tuple[Held, Tensor, str | None]:
    """``W + update`` quantised again: the weight, the numbers it stands for (fp32), and what to warn of, or None.

    The update, in the weight's layout, is added to what `held` (default: the layer's weight) stands for in fp32, and
    rounded once. An update of zeros gives the very same weight back.
    """
    old = held_by(base_layer) if held is None else held
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


def require_kind(base_layer: nn.Module, held: Held = None) -> Kind:
    kind = kind_of(base_layer, held)
    if kind is None:
        raise TypeError(
            "base_layer must be quantised by one of the libraries that are known, got "
            f"{type(base_layer).__name__} with a weight of type {type(getattr(base_layer, 'weight', None)).__name__}"
        )
    return kind
