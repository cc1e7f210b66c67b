"""Weights of 8-bit floats: those that are cast for every call, and the ones with scales of transformers' FP8Linear."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..ordinary import forward_is_replaced, has_own_forward
from .kind import Kind


def is_fp8(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype.itemsize == 1


class Cast(Kind):
    """An ordinary layer, kept in 8-bit floats and cast by hooks or in its forward: diffusers' layerwise casting.

    What else these do is not known.
    """

    is_sure = False

    def recognises(self, base_layer: Any, held: Any) -> bool:
        weight: Any = getattr(base_layer, "weight", None) if held is None else held
        if type(weight) not in (Tensor, nn.Parameter) or not is_fp8(weight.dtype) or has_own_forward(base_layer):
            return False
        return bool(base_layer._forward_pre_hooks) or forward_is_replaced(base_layer)

    def name(self, held: Any) -> str:
        return str(held.dtype).removeprefix("torch.")

    def shape(self, base_layer: Any, held: Any) -> tuple[int, ...]:
        return tuple(held.shape)

    def dequantize(self, base_layer: Any, held: Any) -> Tensor:
        return held.detach().float()

    def requantize(self, base_layer: Any, held: Any, weight: Tensor) -> nn.Parameter:
        return nn.Parameter(_rounded(weight, held.dtype), requires_grad=False)


class FP8Linear(Kind):
    """transformers' (DeepSeek's) with a scale per block, or one for all of the weight."""

    parts = ("weight", "weight_scale_inv")

    def recognises(self, base_layer: Any, held: Any) -> bool:
        module = sys.modules.get("transformers.integrations.finegrained_fp8")
        if module is None or type(base_layer).forward is not module.FP8Linear.forward:
            return False
        weight = base_layer.weight if held is None else held["weight"]
        return is_fp8(weight.dtype)

    def name(self, held: Any) -> str:
        return "transformers' FP8Linear"

    def dequantize(self, base_layer: Any, held: Any) -> Tensor:
        weight, scale = held["weight"].detach().float(), held["weight_scale_inv"].detach().float()
        return weight * _spread(scale, base_layer.block_size, weight.shape)

    def requantize(self, base_layer: Any, held: Any, weight: Tensor) -> dict[str, nn.Parameter]:
        old, dtype, block_size = held["weight_scale_inv"], held["weight"].dtype, base_layer.block_size
        blocks = weight.shape if block_size is None else block_size
        rows, columns = (-(-size // block) for size, block in zip(weight.shape, blocks, strict=True))
        padded = weight.new_zeros(rows * blocks[0], columns * blocks[1])
        padded[: weight.shape[0], : weight.shape[1]] = weight
        largest = padded.unflatten(1, (columns, blocks[1])).unflatten(0, (rows, blocks[0])).abs().amax((1, 3))
        scale = torch.where(largest > 0, largest / torch.finfo(dtype).max, 1.0)
        if is_fp8(old.dtype):  # float8_e8m0fnu: powers of two
            scale = torch.exp2(torch.log2(scale).ceil())
        scale = scale.reshape(old.shape).to(old.dtype)
        codes = _rounded(weight / _spread(scale.float(), block_size, weight.shape), dtype)
        parts = {"weight": codes, "weight_scale_inv": scale}
        return {name: nn.Parameter(part, requires_grad=False) for name, part in parts.items()}


def _spread(scale: Tensor, block_size: Any, shape: torch.Size) -> Tensor:
    """A scale per block as one per number."""
    if block_size is None:
        return scale
    rows = scale.repeat_interleave(block_size[0], 0)[: shape[0]]
    return rows.repeat_interleave(block_size[1], 1)[:, : shape[1]]


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`; what is too large, of which torch makes NaN or infinity, becomes the largest number."""
    largest = torch.finfo(dtype).max
    return torch.where(weight.isfinite(), weight.clamp(-largest, largest), weight).to(dtype)
