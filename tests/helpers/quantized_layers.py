"""Quantised layers for tests: those of libraries that are installed, and weights of 8-bit floats."""

import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import randlora
from helpers.common import make_bases, normal, randomize, reference_update
from randlora.layers import quantized
from randlora.layers.quantized import fp8

HERE = ["cast-e4m3fn", "cast-e5m2"]  # and the kinds whose library is installed
try:
    import bitsandbytes as bnb

    HERE += ["8bit", "nf4", "nf4-flat", "fp4", "fp4-flat"]
except ImportError:
    bnb = None
try:
    from torchao import quantization as ao

    HERE += ["int8", "int8-dynamic", "int4", "int4-dynamic", "float8"]
except ImportError:
    ao = None

try:
    from transformers.integrations import finegrained_fp8

    HERE += ["fp8", "fp8-blocks"]
except ImportError:
    finegrained_fp8 = None
try:
    from diffusers.hooks import apply_layerwise_casting

    HERE += ["cast-diffusers"]
except ImportError:
    apply_layerwise_casting = None
try:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    HERE += ["hqq8", "hqq3"]
except ImportError:
    HQQLinear = None
try:
    from optimum import quanto

    HERE += ["quanto8", "quanto-float8", "quanto4"]
except ImportError:
    quanto = None

needs_bnb = pytest.mark.skipif(bnb is None, reason="bitsandbytes is not installed")
needs_ao = pytest.mark.skipif(ao is None, reason="torchao is not installed")
over_kinds = pytest.mark.parametrize("kind", HERE)
SHAPES = [(41, 24), (24, 41), (33, 33)]
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
STEP = {
    "8bit": 2**-7, "int8": 2**-7, "int8-dynamic": 2**-7, "float8": 2**-3, "cast-e4m3fn": 2**-3, "cast-e5m2": 2**-2,
    "cast-diffusers": 2**-3,
    "fp8": 2**-3, "fp8-blocks": 2**-3, "hqq8": 2**-6, "quanto8": 2**-6, "quanto-float8": 2**-3,
}  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)


def step(kind):
    """The coarsest distance of neighbouring numbers, relative to the largest weight."""
    return STEP.get(kind, 1 / 3)


def make_base(kind, in_features=41, out_features=24, bias=True, dtype=torch.float32):
    """A quantised linear with normal weights; groups of torchao's 4-bit weights are whole rows."""
    plain = nn.Linear(in_features, out_features, bias=bias, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        plain.weight.copy_(normal(out_features, in_features, seed=4))
        if bias:
            plain.bias.copy_(normal(out_features, seed=5))
    if kind == "8bit":
        base = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False)
    elif kind[:3] in ("nf4", "fp4"):
        base = bnb.nn.Linear4bit(
            in_features, out_features, bias=bias, quant_type=kind[:3], compress_statistics=not kind.endswith("flat")
        )
    elif kind.startswith("cast"):
        if kind == "cast-diffusers":
            apply_layerwise_casting(plain, torch.float8_e4m3fn, dtype, None, None)
            return plain
        return cast_for_each_call(plain, getattr(torch, f"float8_{kind[5:]}"), dtype)
    elif kind.startswith("fp8"):
        return as_fp8_linear(plain, (16, 8) if kind == "fp8-blocks" else None)
    elif kind.startswith("hqq"):
        config = BaseQuantizeConfig(nbits=int(kind[3:]), group_size=None)
        return HQQLinear(plain, config, compute_dtype=dtype, device="cpu")
    elif kind.startswith("quanto"):
        if kind == "quanto8" and dtype == torch.bfloat16:
            pytest.skip("the product of optimum-quanto 0.2.7 itself crashes on the CPU for sizes in fours (torch 2.13)")
        model = nn.Sequential(plain)
        quanto.quantize(model, weights={"8": quanto.qint8, "-float8": quanto.qfloat8, "4": quanto.qint4}[kind[6:]])
        quanto.freeze(model)
        return model[0]
    else:
        config = {
            "int8": lambda: ao.Int8WeightOnlyConfig(),
            "int8-dynamic": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
            "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4),
            "int4-dynamic": lambda: ao.Int8DynamicActivationIntxWeightConfig(
                weight_dtype=torch.int4, weight_granularity=ao.PerAxis(0)
            ),
            "float8": lambda: ao.Float8WeightOnlyConfig(),
        }[kind]()
        ao.quantize_(plain, config)
        return plain
    base.to(dtype).load_state_dict(plain.state_dict())
    return base.to("cpu")


def make_layer(kind, in_features=41, out_features=24, bias=True, dtype=torch.float32, r=5, **arguments):
    arguments = {"randlora_alpha": 0.05 * r, "bases": make_bases(in_features, out_features, r), **arguments}
    return randomize(randlora.Linear(make_base(kind, in_features, out_features, bias, dtype), r=r, **arguments))


def parts(base):
    """All tensors that make up a quantised weight, for comparing bits."""
    weight = quantized.held_by(base)
    if isinstance(weight, dict):  # HQQ's have settings among them, transformers' FP8Linear has a scale
        found = [*weight.values(), *weight.get("meta", {}).values()]
        found = [t.detach() for t in found if isinstance(t, torch.Tensor)]
    elif hasattr(weight, "quant_state"):
        state = weight.quant_state
        found = [weight.data, state.absmax, state.code]
        found += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    elif hasattr(weight, "SCB"):
        found = [weight.data, base.state.SCB if weight.SCB is None else weight.SCB]
    else:
        found = _plain_parts(weight)
    # 8-bit floats cannot be compared.
    return [(t.view(torch.uint8) if fp8.is_fp8(t.dtype) else t).clone() for t in found]


def _plain_parts(tensor):
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor.detach()]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _plain_parts(getattr(tensor, name))]


def can_be_copied(kind):
    """Tensors of optimum-quanto 0.2.7 cannot, on torch 2.13, and a copy of a layer of diffusers goes on casting it."""
    return not kind.startswith(("quanto", "cast-diffusers"))


def same(held, other):
    """Whether two weights are the same objects."""
    if isinstance(held, dict):
        return held.keys() == other.keys() and all(value is other[key] for key, value in held.items())
    return held is other


def cast_for_each_call(module, storage, compute):
    """As diffusers' ``apply_layerwise_casting`` does it."""
    module.register_forward_pre_hook(lambda module, args: module.to(compute) and None)
    module.register_forward_hook(lambda module, args, result: module.to(storage) and None)
    return module.to(storage)


def as_fp8_linear(plain, block_size):
    """transformers' own class. What needs a GPU in it, the product, is replaced by :func:`fp8_kernel`."""
    cls, has_bias = finegrained_fp8.FP8Linear, plain.bias is not None
    name = "has_bias" if "has_bias" in inspect.signature(cls).parameters else "bias"  # transformers 5, 4
    base = cls(plain.in_features, plain.out_features, block_size=block_size, **{name: has_bias})
    with torch.no_grad():
        quantized.replace_weight(base, quantized.requantize(base, plain.weight))
    base.bias = plain.bias
    return base


def fp8_kernel(input, weight, weight_scale_inv, block_size=None, bias=None, *_):
    held = {"weight": weight, "weight_scale_inv": weight_scale_inv}
    numbers = fp8.FP8Linear().dequantize(SimpleNamespace(block_size=block_size), held)
    return nn.functional.linear(input, numbers.to(input.dtype), bias)


@pytest.fixture(autouse=finegrained_fp8 is not None)
def kernels(monkeypatch):
    """To be imported by test modules: stands in for kernels that run on GPUs only."""
    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_kernel)


def assert_same_weight(base, before):
    now = parts(base)
    assert len(now) == len(before) and all(torch.equal(a, b) for a, b in zip(now, before, strict=True))


def exact_forward(layer, x, adapters=("default",)):
    weight = quantized.dequantize(layer.base_layer).double() + sum(reference_update(layer, name) for name in adapters)
    return nn.functional.linear(x.double(), weight, None if layer.bias is None else layer.bias.detach().double())


def relative_error(got, exact):
    return (torch.linalg.vector_norm(got.double() - exact) / torch.linalg.vector_norm(exact)).item()


def allowed(kind, dtype):
    """Relative error of the forward: the input's own rounding, and that of inputs which are quantised to 8 bits."""
    if kind.endswith("dynamic"):
        return 2e-2
    return {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
