"""torchao: linears whose weight is a tensor of one of its classes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .kind import Kind, is_of_library


def _like_int8(kind: Any, old: Any, weight: Tensor) -> Tensor:
    return kind.from_hp(
        weight,
        _granularity(old),
        mapping_type=_mapping(old),
        act_quant_kwargs=old.act_quant_kwargs,
        act_quant_scale=old.act_quant_scale,
        act_quant_zero_point=old.act_quant_zero_point,
        act_pre_scale=old.act_pre_scale,
        reduce_range=old.reduce_range,
    )


def _like_intx(kind: Any, old: Any, weight: Tensor) -> Tensor:
    return kind.from_hp(
        weight,
        old.block_size,
        old.target_dtype,
        mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )


def _like_float8(kind: Any, old: Any, weight: Tensor) -> Tensor:
    return kind.from_hp(
        weight,
        old.qdata.dtype,
        _granularity(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


def _like_int4(kind: Any, old: Any, weight: Tensor) -> Tensor:
    new = kind.from_hp(weight, old.block_size)
    new.act_pre_scale = getattr(old, "act_pre_scale", None)
    return new


def _like_nf4(kind: Any, old: Any, weight: Tensor) -> Tensor:
    return kind.from_tensor(weight, old.block_size, old.scaler_block_size)


# How to quantise a weight [out, in] as an old one was. Where the settings cannot be read off a tensor (HQQ's choice of
# scales, a mapping without clipping error), torchao's default is taken.
TORCHAO_KINDS: dict[str, Callable[[Any, Any, Tensor], Tensor]] = {
    "Int8Tensor": _like_int8,
    "IntxUnpackedToInt8Tensor": _like_intx,
    "Float8Tensor": _like_float8,
    "Int4Tensor": _like_int4,
    "Int4PlainInt32Tensor": _like_int4,
    "Int4TilePackedTo4dTensor": _like_int4,
    "NF4Tensor": _like_nf4,
}


CODES = ("Int8Tensor", "IntxUnpackedToInt8Tensor")  # with a number of 8 bits for each of the weight's


def _of_codes(held: Any, dtype: torch.dtype) -> Tensor | None:
    """What dequantize() gives, bit for bit, in two passes over the numbers where torchao takes five; None for forms
    that are not known.

    Differences of two codes are exact in every float dtype, so that only the product with the scale is rounded.
    """
    codes, scale, zero_point = held.qdata, held.scale, held.zero_point
    plain = codes.dim() == scale.dim() == 2 and held.dtype == dtype and getattr(held, "act_pre_scale", None) is None
    if not plain or any(t is not None and t.dtype != torch.int8 for t in (codes, zero_point)):
        return None
    rows, columns = held.block_size
    # In the dtype of the product, as a product of two dtypes is slow on CPUs.
    weight = codes.to(torch.promote_types(dtype, scale.dtype)).view(len(scale), rows, -1, columns)
    if zero_point is not None:
        weight -= zero_point[:, None, :, None]
    weight *= scale[:, None, :, None]
    return weight.view(codes.shape).to(dtype)


def _granularity(old: Any) -> Any:
    module = sys.modules["torchao.quantization.granularity"]
    rows, columns = old.block_size
    if (rows, columns) == tuple(old.shape) and rows > 1:
        return module.PerTensor()
    return module.PerRow() if columns == old.shape[1] else module.PerGroup(columns)


def _mapping(old: Any) -> Any:
    types = sys.modules["torchao.quantization.quant_primitives"].MappingType
    return types.SYMMETRIC if old.zero_point is None or not old.zero_point.any() else types.ASYMMETRIC


class TorchAO(Kind):
    has_gradient = False

    def recognises(self, base_layer: Any, held: Any) -> bool:
        return is_of_library(held if held is not None else getattr(base_layer, "weight", None), "torchao")

    def name(self, held: Any) -> str:
        return f"torchao's {type(held).__name__}"

    def dequantize(self, base_layer: Any, held: Any) -> Tensor:
        held = held.detach()
        if hasattr(held, "get_original_weight"):  # NF4Tensor, whose dequantize() is another function
            return held.get_original_weight()
        if type(held).dequantize is Tensor.dequantize:  # PyTorch's, for its own quantised dtypes
            one = torch.eye(held.shape[1], dtype=held.dtype, device=held.device)
            return nn.functional.linear(one, held).t()
        weight = held.dequantize().float()
        scale = getattr(held, "act_pre_scale", None)  # SmoothQuant and AWQ scale the input by it
        return weight if scale is None else weight * scale

    def in_dtype(self, base_layer: Any, held: Any, dtype: torch.dtype) -> Tensor:
        weight = _of_codes(held.detach(), dtype) if type(held).__name__ in CODES else None
        return super().in_dtype(base_layer, held, dtype) if weight is None else weight

    def requantize(self, base_layer: Any, held: Any, weight: Tensor) -> nn.Parameter:
        name, reason = type(held).__name__, "its settings are not known"
        weight = weight.to(held.dtype)  # what torchao's quantize_ would have been given
        if name in TORCHAO_KINDS:
            scale = getattr(held, "act_pre_scale", None)
            try:
                scaled = weight if scale is None else weight / scale
                return nn.Parameter(TORCHAO_KINDS[name](type(held), held.detach(), scaled), requires_grad=False)
            except (TypeError, AttributeError, ImportError, NotImplementedError) as error:  # another version, device
                reason = str(error)
        warnings.warn(
            f"torchao's {name} cannot be quantised again ({reason}): the merged weight stays in {weight.dtype}, "
            f"{weight.nbytes / 2**20:.1f} MiB",
            stacklevel=3,
        )
        return nn.Parameter(weight, requires_grad=False)
