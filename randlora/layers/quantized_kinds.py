"""What each library's quantised weight is made of, for :mod:`randlora.layers.quantized`.

A kind is a class of functions: ``name``, ``dequantize``, ``requantize`` and what goes with a weight when a layer
changes it. The libraries are taken from ``sys.modules``: where there is a layer of theirs, they are loaded.
"""

from __future__ import annotations

import copy
import sys
import warnings

import torch
from torch import Tensor, nn


class Bnb4bit:
    @staticmethod
    def name(parameter: nn.Parameter) -> str:
        return "4-bit"

    @staticmethod
    def state(base_layer: nn.Module, parameter: Tensor):
        """The statistics of the weight. FSDP and others lose them with the parameter's class; the layer keeps them."""
        state = getattr(parameter, "quant_state", None)
        return getattr(base_layer, "quant_state", None) if state is None else state

    @staticmethod
    def unpacked(parameter: Tensor, state) -> tuple[Tensor, object]:
        """The packed weight's codes in bitsandbytes' own order, and its statistics: the numbers do not change."""
        state = copy.copy(state)
        absmax = state.absmax.T.reshape(-1).float()  # what bitsandbytes' own inverse forgets, or rounds once more
        state.original_nested = False
        data, state = sys.modules["bitsandbytes.functional"]._convert_weight_packed_for_cpu_inverse(
            parameter.data, state
        )
        state.absmax, state.nested, state.state2, state.offset = absmax, False, None, None
        return data, state

    @staticmethod
    def dequantize(base_layer: nn.Module, parameter: Tensor) -> Tensor:
        state, data = Bnb4bit.state(base_layer, parameter), parameter.data
        if state is None:
            raise _not_yet("4-bit")
        if getattr(state, "packing_format_for_cpu", False):
            data, state = Bnb4bit.unpacked(parameter, state)
        state = copy.copy(state)
        state.dtype = torch.float32  # whatever dtype the weight came from
        return sys.modules["bitsandbytes.functional"].dequantize_4bit(data.reshape(-1, 1), state).view(state.shape)

    @staticmethod
    def requantize(base_layer: nn.Module, old: Tensor, weight: Tensor) -> nn.Parameter:
        state = Bnb4bit.state(base_layer, old)
        if state is None:
            raise _not_yet("4-bit")
        new = sys.modules["bitsandbytes.nn.modules"].Params4bit(
            weight,
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=getattr(old, "compress_statistics", state.nested),
            quant_type=state.quant_type,
            quant_storage=base_layer.quant_storage,
        ).to(weight.device)  # fmt: skip
        new.quant_state.dtype = state.dtype
        return new

    @staticmethod
    def before_replacing(base_layer: nn.Module, old: nn.Parameter) -> None:
        old.quant_state = Bnb4bit.state(base_layer, old)

    @staticmethod
    def after_replacing(base_layer: nn.Module, parameter: nn.Parameter) -> None:
        base_layer.quant_state = parameter.quant_state


class Bnb8bit:
    @staticmethod
    def name(parameter: nn.Parameter) -> str:
        return "8-bit"

    @staticmethod
    def dequantize(base_layer: nn.Module, parameter: Tensor) -> Tensor:
        if base_layer.state.has_fp16_weights:  # quantised anew at every call
            return parameter.detach().float().clone()
        scale = getattr(parameter, "SCB", None)
        if scale is None:  # the first call moves it over
            scale = base_layer.state.SCB
        if parameter.dtype != torch.int8 or scale is None:
            raise _not_yet("8-bit")
        return parameter.data * (scale.to(parameter.device, torch.float32) / 127).unsqueeze(1)

    @staticmethod
    def requantize(base_layer: nn.Module, old: Tensor, weight: Tensor) -> nn.Parameter:
        Int8Params = sys.modules["bitsandbytes.nn.modules"].Int8Params
        if base_layer.state.has_fp16_weights:
            return Int8Params(weight.to(old.dtype), requires_grad=False, has_fp16_weights=True)
        if old.dtype != torch.int8:
            raise _not_yet("8-bit")
        quantize = sys.modules["bitsandbytes.functional"].int8_vectorwise_quant
        codes, scale, _ = quantize(weight.half())  # the only dtype it takes
        return Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scale)

    @staticmethod
    def before_replacing(base_layer: nn.Module, old: nn.Parameter) -> None:
        state = base_layer.state
        if not state.has_fp16_weights and state.CB is not None:
            old.CB, old.SCB = state.CB, state.SCB

    @staticmethod
    def after_replacing(base_layer: nn.Module, parameter: nn.Parameter) -> None:
        # A state of its own: graphs read theirs in backward. The next call fills it from the parameter.
        base_layer.state = copy.copy(base_layer.state)
        base_layer.state.reset_grads()


def _like_int8(kind: type, old: Tensor, weight: Tensor) -> Tensor:
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


def _like_intx(kind: type, old: Tensor, weight: Tensor) -> Tensor:
    return kind.from_hp(
        weight,
        old.block_size,
        old.target_dtype,
        mapping_type=_mapping(old),
        activation_quantization=old.activation_quantization,
    )


def _like_float8(kind: type, old: Tensor, weight: Tensor) -> Tensor:
    return kind.from_hp(
        weight,
        old.qdata.dtype,
        _granularity(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


def _like_nf4(kind: type, old: Tensor, weight: Tensor) -> Tensor:
    return kind.from_tensor(weight, old.block_size, old.scaler_block_size)


# How to quantise a weight [out, in] as an old one was. Where the settings cannot be read off a tensor (HQQ's choice of
# scales, a mapping without clipping error), torchao's default is taken.
TORCHAO_KINDS = {
    "Int8Tensor": _like_int8,
    "IntxUnpackedToInt8Tensor": _like_intx,
    "Float8Tensor": _like_float8,
    "NF4Tensor": _like_nf4,
}


def _granularity(old: Tensor):
    module = sys.modules["torchao.quantization.granularity"]
    rows, columns = old.block_size
    if (rows, columns) == tuple(old.shape) and rows > 1:
        return module.PerTensor()
    return module.PerRow() if columns == old.shape[1] else module.PerGroup(columns)


def _mapping(old: Tensor):
    types = sys.modules["torchao.quantization.quant_primitives"].MappingType
    return types.SYMMETRIC if old.zero_point is None or not old.zero_point.any() else types.ASYMMETRIC


class TorchAO:
    @staticmethod
    def name(parameter: nn.Parameter) -> str:
        return f"torchao's {type(parameter).__name__}"

    @staticmethod
    def dequantize(base_layer: nn.Module | None, parameter: Tensor) -> Tensor:
        parameter = parameter.detach()
        if hasattr(parameter, "get_original_weight"):  # NF4Tensor, whose dequantize() is another function
            return parameter.get_original_weight()
        if type(parameter).dequantize is Tensor.dequantize:  # PyTorch's, for its own quantised dtypes
            one = torch.eye(parameter.shape[1], dtype=parameter.dtype, device=parameter.device)
            return nn.functional.linear(one, parameter).t()
        weight = parameter.dequantize().float()
        scale = getattr(parameter, "act_pre_scale", None)  # SmoothQuant and AWQ scale the input by it
        return weight if scale is None else weight * scale

    @staticmethod
    def requantize(base_layer: nn.Module, old: Tensor, weight: Tensor) -> nn.Parameter:
        name, reason = type(old).__name__, "its settings are not known"
        weight = weight.to(old.dtype)  # what torchao's quantize_ would have been given
        if name in TORCHAO_KINDS:
            scale = getattr(old, "act_pre_scale", None)
            try:
                scaled = weight if scale is None else weight / scale
                return nn.Parameter(TORCHAO_KINDS[name](type(old), old.detach(), scaled), requires_grad=False)
            except (TypeError, AttributeError) as error:  # another version of torchao
                reason = str(error)
        warnings.warn(
            f"torchao's {name} cannot be quantised again ({reason}): the merged weight stays in {weight.dtype}, "
            f"{weight.nbytes / 2**20:.1f} MiB",
            stacklevel=3,
        )
        return nn.Parameter(weight, requires_grad=False)

    @staticmethod
    def before_replacing(base_layer: nn.Module, old: nn.Parameter) -> None:
        pass

    after_replacing = before_replacing


class StraightThrough(torch.autograd.Function):
    """``apply(y, x, weight)`` is `y`, with the gradient ``g @ dequantised weight`` for x, and g for y (its bias)."""

    @staticmethod
    def forward(y, x, weight):
        return torch.ops.aten._unsafe_view(y, y.shape)  # not a view, which in-place operations could not touch

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, weight = inputs
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        d_x = None
        if ctx.needs_input_grad[1]:
            d_x = (grad @ TorchAO.dequantize(None, weight).to(grad.dtype)).to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, d_x, None


def kind_of(base_layer: nn.Module, parameter: Tensor | None = None):
    bitsandbytes = sys.modules.get("bitsandbytes.nn.modules")
    if bitsandbytes is not None:
        if isinstance(base_layer, bitsandbytes.Linear4bit):
            return Bnb4bit
        if isinstance(base_layer, bitsandbytes.Linear8bitLt):
            return Bnb8bit
    weight = getattr(base_layer, "weight", None) if parameter is None else parameter
    if type(weight) not in (Tensor, nn.Parameter) and any(
        c.__module__.partition(".")[0] == "torchao" for c in type(weight).__mro__
    ):
        return TorchAO
    return None


def require_kind(base_layer: nn.Module, parameter: Tensor | None):
    kind = kind_of(base_layer, parameter)
    if kind is None:
        raise TypeError(
            "base_layer must be quantised by bitsandbytes or torchao, got "
            f"{type(base_layer).__name__} with a weight of type {type(getattr(base_layer, 'weight', None)).__name__}"
        )
    return kind


def _not_yet(bits: str) -> ValueError:
    return ValueError(
        f"the {bits} base layer has not quantised its weight yet: move it to a device first, for example .to('cpu')"
    )
