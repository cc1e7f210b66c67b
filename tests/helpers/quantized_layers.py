"""Quantised layers for tests: bitsandbytes and torchao run on the CPU."""

import pytest
import torch
from torch import nn

import randlora
from helpers.common import make_bases, normal, randomize, reference_update
from randlora.layers import quantized

HERE = []  # kinds whose library is installed
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

needs_bnb = pytest.mark.skipif(bnb is None, reason="bitsandbytes is not installed")
needs_ao = pytest.mark.skipif(ao is None, reason="torchao is not installed")
needs_either = pytest.mark.skipif(not HERE, reason="neither bitsandbytes nor torchao is installed")
over_kinds = pytest.mark.parametrize("kind", HERE)
SHAPES = [(41, 24), (24, 41), (33, 33)]
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
STEP = {"8bit": 2**-7, "int8": 2**-7, "int8-dynamic": 2**-7, "float8": 2**-3}
DTYPES = (torch.float32, torch.bfloat16)


def step(kind):
    """The coarsest distance of neighbouring numbers, relative to the largest weight."""
    return STEP.get(kind, 1 / 3)


def make_base(kind, in_features=41, out_features=24, bias=True, dtype=torch.float32):
    """A quantised linear with normal weights; groups of torchao's 4-bit weights are whole rows."""
    plain = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
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
    weight = base.weight
    if hasattr(weight, "quant_state"):
        state = weight.quant_state
        found = [weight.data, state.absmax, state.code]
        found += [state.offset, state.state2.absmax, state.state2.code] if state.nested else []
    elif hasattr(weight, "SCB"):
        found = [weight.data, base.state.SCB if weight.SCB is None else weight.SCB]
    else:
        found = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [t.clone() for t in found]


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
