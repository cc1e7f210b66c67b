"""bitsandbytes: ``Linear4bit`` and ``Linear8bitLt``."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .kind import Kind


class Bnb4bit(Kind):
    def recognises(self, base_layer: Any, held: Any) -> bool:
        return _is_a(base_layer, "Linear4bit")

    def name(self, held: Any) -> str:
        return "4-bit"

    def state(self, base_layer: Any, held: Any) -> Any:
        """The statistics of the weight. FSDP and others lose them with the parameter's class; the layer keeps them."""
        state = getattr(held, "quant_state", None)
        return getattr(base_layer, "quant_state", None) if state is None else state

    def unpacked(self, held: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The packed weight's codes in bitsandbytes' own order, and its statistics: the numbers do not change."""
        state = copy.copy(state)
        absmax = state.absmax.T.reshape(-1).float()  # what bitsandbytes' own inverse forgets, or rounds once more
        state.original_nested = False
        data, state = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse(held.data, state)
        state.absmax, state.nested, state.state2, state.offset = absmax, False, None, None
        return data, state

    def dequantize(self, base_layer: Any, held: Any) -> Tensor:
        state, data = self.state(base_layer, held), held.data
        if state is None:
            raise _not_yet("4-bit")
        if getattr(state, "packing_format_for_cpu", False):
            data, state = self.unpacked(held, state)
        state = copy.copy(state)
        state.dtype = torch.float32  # whatever dtype the weight came from
        return sys.modules["bitsandbytes.functional"].dequantize_4bit(data.reshape(-1, 1), state).view(state.shape)

    def requantize(self, base_layer: Any, held: Any, weight: Tensor) -> nn.Parameter:
        state = self.state(base_layer, held)
        if state is None:
            raise _not_yet("4-bit")
        new = sys.modules["bitsandbytes.nn.modules"].Params4bit(
            weight,
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=getattr(held, "compress_statistics", state.nested),
            quant_type=state.quant_type,
            quant_storage=base_layer.quant_storage,
        ).to(weight.device)  # fmt: skip
        new.quant_state.dtype = state.dtype
        return new

    def put(self, base_layer: Any, held: Any) -> None:
        base_layer.weight.quant_state = self.state(base_layer, base_layer.weight)
        super().put(base_layer, held)
        base_layer.quant_state = held.quant_state


class Bnb8bit(Kind):
    def recognises(self, base_layer: Any, held: Any) -> bool:
        return _is_a(base_layer, "Linear8bitLt")

    def name(self, held: Any) -> str:
        return "8-bit"

    def dequantize(self, base_layer: Any, held: Any) -> Tensor:
        if base_layer.state.has_fp16_weights:  # quantised anew at every call
            return held.detach().float().clone()
        scale = getattr(held, "SCB", None)
        if scale is None:  # the first call moves it over
            scale = base_layer.state.SCB
        if held.dtype != torch.int8 or scale is None:
            raise _not_yet("8-bit")
        return held.data * (scale.to(held.device, torch.float32) / 127).unsqueeze(1)

    def requantize(self, base_layer: Any, held: Any, weight: Tensor) -> nn.Parameter:
        Int8Params = sys.modules["bitsandbytes.nn.modules"].Int8Params
        if base_layer.state.has_fp16_weights:
            return Int8Params(weight.to(held.dtype), requires_grad=False, has_fp16_weights=True)
        if held.dtype != torch.int8:
            raise _not_yet("8-bit")
        quantize = sys.modules["bitsandbytes.functional"].int8_vectorwise_quant
        codes, scale, _ = quantize(weight.half())  # the only dtype it takes
        return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)

    def put(self, base_layer: Any, held: Any) -> None:
        state, old = base_layer.state, base_layer.weight
        if not state.has_fp16_weights and state.CB is not None:
            old.CB, old.SCB = state.CB, state.SCB
        super().put(base_layer, held)
        # A state of its own: graphs read theirs in backward. The next call fills it from the parameter.
        base_layer.state = copy.copy(base_layer.state)
        base_layer.state.reset_grads()


def _is_a(base_layer: Any, name: str) -> bool:
    modules = sys.modules.get("bitsandbytes.nn.modules")
    return modules is not None and isinstance(base_layer, getattr(modules, name))


def _not_yet(bits: str) -> ValueError:
    return ValueError(
        f"the {bits} base layer has not quantised its weight yet: move it to a device first, for example .to('cpu')"
    )
