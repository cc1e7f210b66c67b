"""Which modules behave as a linear layer: of what size they are, and what they compute in.

The rule, whatever the class: such a module says how many features it takes and gives, in ``in_features`` and
``out_features`` (older GPTQ layers: ``infeatures``, ``outfeatures``), and has no linear layers inside. That it does
take ``x [..., in]`` to ``[..., out]`` is seen when it is called (:func:`randlora.layers.base_layer.product`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import zero3
from . import offload
from .experts_form import is_fused_experts
from .ordinary import conv1d_types, has_weight_method, tensor_weight
from .quantized import is_quantized
from .quantized.fp8 import is_fp8

_NAMES = (("in_features", "out_features"), ("infeatures", "outfeatures"))
_CODES = (torch.int8, torch.uint8, torch.int16, torch.int32)


def sizes_of(module: Any) -> tuple[int, int] | None:
    """How many features a module takes and gives, None if it does not say that as a linear layer does."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    for names in _NAMES:
        sizes: list[Any] = [getattr(module, name, None) for name in names]
        if all(isinstance(size, Integral) and not isinstance(size, bool) and int(size) >= 0 for size in sizes):
            return int(sizes[0]), int(sizes[1])
    if any(isinstance(module, cls) for cls in (*conv1d_types(), *_eetq_types())):
        in_features, out_features = zero3.shape_of(module.weight)
        return in_features, out_features
    return None


def require_linear(module: nn.Module) -> tuple[int, int]:
    """Its sizes. Raises ``TypeError`` for what is no linear layer."""
    sizes = sizes_of(module)
    if sizes is None or not is_linear(module):
        inside = "" if sizes is None else ", which has linear layers inside: adapt those"
        inside = ", whose weights randlora.Experts adapts" if is_fused_experts(module) else inside
        raise TypeError(
            "base_layer must be a linear layer: a torch.nn.Linear, transformers' Conv1D, or a module with numbers "
            f"in_features and out_features, got {type(module).__name__}{inside}"
        )
    return sizes


def is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    if sizes_of(module) is None:
        return False
    # An MLP that has these attributes is no linear layer. HQQ can be told to keep the layer that it was made of.
    return is_quantized(module) or not any(part is not module and is_linear(part) for part in module.modules())


def is_sure_to_be_linear(module: nn.Module) -> bool:
    """What ``"all-linear"`` means: ``nn.Linear`` and ``Conv1D``, and of all others those whose weight is in codes.

    Other modules may have the two attributes and compute something else (layers of graph networks, splines), so that
    they are adapted where they are named only.
    """
    if is_ordinary(module):
        return True
    coded = is_quantized(module) or has_weight_method(module) or any(map(_is_coded, _own(module)))
    return coded and is_linear(module)


def is_ordinary(module: nn.Module) -> bool:
    """Whether it is of the classes that adapters were made for, or derived from one."""
    return isinstance(module, (nn.Linear, *conv1d_types()))


def is_transposed(module: nn.Module) -> bool:
    """Whether it has an ordinary weight ``[in, out]``."""
    return isinstance(module, conv1d_types())


def dtype_and_device(module: nn.Module, weight_name: str = "weight") -> tuple[torch.dtype | None, torch.device | None]:
    """What a layer computes in outside of autocast, and where; None for what it does not tell."""
    tensors = list(_own(module))
    device = next((offload.device_of(module, tensor) for tensor in tensors), None)
    weight, dtype = tensor_weight(module, weight_name), getattr(module, "compute_dtype", None)
    if weight is not None:
        device = offload.device_of(module, weight)
        if _computes(weight.dtype):
            return weight.dtype, device
    if not (isinstance(dtype, torch.dtype) and _computes(dtype)):  # that of the scales, codebooks or bias
        dtype = min((t.dtype for t in tensors if _computes(t.dtype)), key=lambda dtype: dtype.itemsize, default=None)
    return dtype, device


def _own(module: nn.Module) -> Iterator[Tensor]:
    """The tensors that a module has itself, in whichever way."""
    for held in (module._parameters, module._buffers, vars(module)):
        yield from (value for value in held.values() if isinstance(value, Tensor))


def _computes(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize > 1


def _is_coded(tensor: Tensor) -> bool:
    return tensor.dim() > 0 and (tensor.dtype in _CODES or is_fp8(tensor.dtype))


def _eetq_types() -> tuple[type, ...]:
    """transformers' EetqLinear, which has no other size than that of its weight ``[in, out]``."""
    module = sys.modules.get("transformers.integrations.eetq")
    return () if module is None else (module.EetqLinear,)
