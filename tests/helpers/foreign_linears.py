"""Linear layers that are no ``nn.Linear``, by name: those of libraries that are installed, and stand-ins.

A stand-in has the attributes, the shapes and dtypes of its tensors and the gradients of the layer that it stands for.
Every layer has random codes; :func:`exact` gives the weight ``[out, in]`` that these stand for, in fp64.
"""

import importlib.util
import warnings

import pytest
import torch
from torch import nn

from helpers.common import normal

GROUP = 8
NIBBLES = 4 * torch.arange(8, dtype=torch.int32)


def codes(*shape, low=0, high=16, dtype=torch.int32, seed=21):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def scales(*shape, dtype=torch.float16):
    return (normal(*shape, seed=22).abs() * 0.05 + 0.02).to(dtype)


def packed(numbers, dim):
    """Eight numbers of four bits in an int32 along a dimension."""
    parts = numbers.unflatten(dim, (-1, 8)).movedim(dim + 1, -1)
    return (parts << NIBBLES).sum(-1, dtype=torch.int32)


def unpacked(words, dim):
    return (words.unsqueeze(-1) >> NIBBLES & 15).movedim(-1, dim + 1).flatten(dim, dim + 1)


class Metadata:
    """GPT-QModel's layers have something as their weight that has a shape and no numbers."""

    def __init__(self, *shape):
        self.shape, self.dtype, self.device = torch.Size(shape), torch.float16, torch.device("cpu")


class Gptq(nn.Module):
    """AutoGPTQ's QuantLinear, whose sizes have names of their own; GPT-QModel's metadata."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.infeatures, self.outfeatures = in_features, out_features
        self.register_buffer("qweight", packed(codes(in_features, out_features), 0))
        self.register_buffer("scales", scales(in_features // GROUP, out_features))
        self.register_buffer("g_idx", torch.arange(in_features) // GROUP)
        self.register_buffer("bias", normal(out_features, seed=5, dtype=torch.float16))
        self.weight = Metadata(out_features, in_features)

    def numbers(self):
        return ((unpacked(self.qweight, 0) - 8) * self.scales.double()[self.g_idx]).T

    def forward(self, x):
        return x @ self.numbers().to(x.dtype).T + self.bias.to(x.dtype)


class AwqProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x @ layer.numbers().to(x.dtype).T + layer.bias.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.numbers().to(grad.dtype), None


class Awq(nn.Module):
    """AutoAWQ's WQLinear_GEMM: packed along the outputs, and without a gradient in eval mode."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features, self.w_bit, self.group_size = in_features, out_features, 4, GROUP
        self.register_buffer("qweight", packed(codes(in_features, out_features), 1))
        self.register_buffer("scales", scales(in_features // GROUP, out_features))
        self.register_buffer("bias", normal(out_features, seed=5, dtype=torch.float16))

    def numbers(self):
        return ((unpacked(self.qweight, 1) - 8) * self.scales.double().repeat_interleave(GROUP, 0)).T

    def forward(self, x):
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            return AwqProduct.apply(x, self)


class Aqlm(nn.Module):
    """AQLM's QuantizedLinear: sums of vectors from a codebook."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.codebooks = nn.Parameter(normal(1, 16, 1, 8, seed=23), requires_grad=False)
        self.codes = nn.Parameter(codes(out_features, in_features // 8, 1, dtype=torch.int8), requires_grad=False)
        self.scales = nn.Parameter(scales(out_features, 1, 1, 1, dtype=torch.float32), requires_grad=False)
        self.register_parameter("bias", None)

    def numbers(self):
        return (self.codebooks.double()[0, self.codes[..., 0].long(), 0] * self.scales.double()[..., 0]).flatten(1)

    def forward(self, x):
        return x @ self.numbers().to(x.dtype).T


class Plain(nn.Module):
    """A layer of somebody's own around an ordinary weight; with ``skip_bias_add`` as Megatron's."""

    def __init__(self, in_features, out_features, skip_bias_add=False):
        super().__init__()
        self.in_features, self.out_features, self.skip_bias_add = in_features, out_features, skip_bias_add
        self.weight = nn.Parameter(normal(out_features, in_features, seed=4))
        self.bias = nn.Parameter(normal(out_features, seed=5))

    def numbers(self):
        return self.weight.detach().double()

    def forward(self, x):
        y = x @ self.weight.T
        return (y, self.bias) if self.skip_bias_add else y + self.bias


class EetqKernels:
    """In the place of EETQ's, which run on GPUs only."""

    @staticmethod
    def w8_a16_gemm(x, weight, weight_scales):
        return x @ (weight * weight_scales.float()).to(x.dtype)


def eetq(in_features, out_features):
    """transformers' own class, which says its sizes by its weight ``[in, out]`` alone."""
    module = pytest.importorskip("transformers.integrations.eetq")
    module.eetq_kernels_hub = EetqKernels
    layer = module.EetqLinear(in_features, out_features, bias=True)
    layer.weight.copy_(codes(in_features, out_features, low=-127, high=128, dtype=torch.int8))
    layer.weight_scales.data = scales(out_features) / 50
    layer.bias.data = normal(out_features, seed=5, dtype=torch.float16)
    layer.numbers = lambda: (layer.weight * layer.weight_scales.detach().double()).T
    return layer


def gptqmodel(in_features, out_features):
    cls = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    arguments = {"bits": 4, "group_size": 16, "sym": True, "desc_act": False, "bias": True}
    layer = cls(in_features=in_features, out_features=out_features, **arguments)
    layer.qweight.copy_(packed(codes(in_features, out_features), 0))
    layer.qzeros.copy_(packed(torch.full((in_features // 16, out_features), 8, dtype=torch.int32), 1))
    layer.scales.copy_(scales(in_features // 16, out_features))
    layer.bias.copy_(normal(out_features, seed=5))
    layer.numbers = lambda: ((codes(in_features, out_features) - 8) * layer.scales.double().repeat_interleave(16, 0)).T
    return layer


def autoawq(in_features, out_features):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gemm = pytest.importorskip("awq.modules.linear.gemm")
    layer = gemm.WQLinear_GEMM(4, 16, in_features, out_features, True, "cpu")
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    pack = lambda numbers: packed(numbers.unflatten(1, (-1, 8))[..., order].flatten(1), 1)  # noqa: E731
    layer.qweight.copy_(pack(codes(in_features, out_features)))
    layer.qzeros.copy_(pack(torch.full((in_features // 16, out_features), 8, dtype=torch.int32)))
    layer.scales.copy_(scales(in_features // 16, out_features))
    layer.bias.copy_(normal(out_features, seed=5))
    layer.numbers = lambda: ((codes(in_features, out_features) - 8) * layer.scales.double().repeat_interleave(16, 0)).T
    return layer


def aqlm(in_features, out_features):
    """Of 16 entries per codebook: with 256, aqlm 1.1.7 itself has no gradient on the CPU."""
    layer = pytest.importorskip("aqlm").QuantizedLinear(in_features, out_features, 8, 1, 2, 4, dtype=torch.float32)
    layer.codebooks.data = normal(2, 16, 1, 8, seed=23)
    layer.codes.data = codes(out_features, in_features // 8, 2, low=-8, high=8, dtype=torch.int8)
    layer.scales.data = scales(out_features, 1, 1, 1, dtype=torch.float32)
    layer.bias.data = normal(out_features, seed=5)
    layer.numbers = lambda: sum(
        (layer.codebooks.double()[i, layer.codes[..., i].long() % 16, 0] for i in (0, 1)), start=0
    ).mul(layer.scales.double()[..., 0]).flatten(1)  # fmt: skip
    return layer


MAKE = {"gptq": Gptq, "awq": Awq, "aqlm": Aqlm, "plain": Plain}  # stand-ins
if importlib.util.find_spec("transformers"):
    MAKE["eetq"] = eetq
MAKE |= {
    f"real-{name}": make
    for name, make in (("gptqmodel", gptqmodel), ("awq", autoawq), ("aqlm", aqlm))
    if importlib.util.find_spec(name)
}
over_foreign = pytest.mark.parametrize("name", MAKE)
QUANTISED = [name for name in MAKE if name != "plain"]
HALF = ("real-gptqmodel", "real-awq")  # compute in fp16


def exact(layer):
    return layer.numbers().detach().double()
