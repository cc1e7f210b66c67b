"""Quantised base layers: their weights as numbers, and what is said and saved of them."""

import copy
import pickle

import pytest
import torch
from helpers.common import make_bases, normal, over, randomize, reference_update
from helpers.quantized_layers import (
    DTYPES,
    HERE,
    allowed,
    ao,
    assert_same_weight,
    bnb,
    can_be_copied,
    exact_forward,
    kernels,  # noqa: F401
    make_base,
    make_layer,
    needs_ao,
    needs_bnb,
    over_kinds,
    over_shapes,
    parts,
    relative_error,
    same,
    step,
)  # fmt: skip
from torch import nn

import randlora
from randlora.layers import quantized


@over_kinds
@over_shapes
def test_dequantize_gives_what_the_layer_computes_with(kind, shape):
    base = make_base(kind, *shape, bias=False)
    weight = quantized.dequantize(base)
    assert quantized.is_quantized(base) and weight.dtype == torch.float32 and weight.shape == shape[::-1]
    assert (weight - normal(*shape[::-1], seed=4)).abs().max() <= step(kind) * normal(*shape[::-1], seed=4).abs().max()
    assert relative_error(base(normal(7, shape[0])), normal(7, shape[0]).double() @ weight.double().t()) <= allowed(
        kind, torch.float32
    )


@over_kinds
@over("dtype", DTYPES)
def test_requantize_repeats_the_settings_and_assigns_nothing(kind, dtype):
    base, x = make_base(kind, dtype=dtype), normal(2, 41, dtype=dtype)
    base(x)  # bitsandbytes' 8-bit layer moves its scales at the first call
    before = parts(base)
    weight = normal(24, 41, seed=9)
    parameter = quantized.requantize(base, weight)
    assert_same_weight(base, before)
    assert type(parameter) is type(quantized.held_by(base)) and not getattr(parameter, "requires_grad", False)
    old = quantized.replace_weight(base, parameter)
    assert same(quantized.held_by(base), parameter)
    now = parts(base)
    assert [(t.dtype, t.shape) for t in now] == [(t.dtype, t.shape) for t in before]
    assert getattr(parameter, "dtype", None) == getattr(old, "dtype", None)
    if kind[:3] in ("nf4", "fp4"):
        assert base.quant_state is parameter.quant_state and parameter.quant_state.dtype == dtype
        parameter.quant_state = None  # as FSDP does
    assert (quantized.dequantize(base) - weight).abs().max() <= step(kind) * weight.abs().max()
    expected = nn.functional.linear(x.double(), quantized.dequantize(base).double(), base.bias.double())
    assert relative_error(base(x), expected.detach()) <= allowed(kind, dtype)
    assert same(quantized.replace_weight(base, old), parameter)
    assert_same_weight(base, before)
    # The same numbers quantise to themselves, up to the scales: torchao's leave room for half a step.
    again = quantized.dequantize(base, quantized.requantize(base, quantized.dequantize(base)))
    assert relative_error(again, quantized.dequantize(base).double()) < step(kind)


@needs_ao
@pytest.mark.parametrize(
    "config, granularity",
    [("Int8WeightOnlyConfig", "PerTensor")]
    + [(c, g) for c in ("Int8WeightOnlyConfig", "IntxWeightOnlyConfig", "asymmetric") for g in ("PerRow", "PerGroup")],
)
def test_torchao_settings_are_kept(config, granularity):
    choice = getattr(ao, granularity)(*([16] if granularity == "PerGroup" else []))
    if config != "Int8WeightOnlyConfig":
        choice = ao.PerAxis(0) if granularity == "PerRow" else choice
        mapping = ao.MappingType.ASYMMETRIC if config == "asymmetric" else ao.MappingType.SYMMETRIC
        chosen = ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=choice, mapping_type=mapping)
    else:
        chosen = ao.Int8WeightOnlyConfig(granularity=choice)
    base = nn.Linear(64, 24)
    ao.quantize_(base, chosen)
    new = quantized.requantize(base, quantized.dequantize(base) * 2)
    assert new.block_size == base.weight.block_size and new.scale.shape == base.weight.scale.shape
    assert (new.qdata.int() - base.weight.qdata.int()).abs().max() <= 1
    assert bool(new.zero_point.any()) == (config == "asymmetric") == bool(base.weight.zero_point.any())


@over_kinds
@over("dtype", DTYPES)
def test_the_weight_for_a_product_is_what_dequantize_gives(kind, dtype):
    base = make_base(kind, dtype=dtype)
    base(normal(2, 41, dtype=dtype))
    of_library, held = quantized.kind_of(base), quantized.held_by(base)
    for wanted in (dtype, torch.float32):
        made = of_library.in_dtype(base, held, wanted)
        assert made.dtype == wanted and torch.equal(made, quantized.dequantize(base).to(wanted))


@needs_ao
@pytest.mark.parametrize("granularity", ["PerRow", "PerGroup"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("mapping", ["SYMMETRIC", "ASYMMETRIC"])
@pytest.mark.parametrize("scale", [None, torch.float32, torch.bfloat16, torch.float16], ids=str)
@over("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_of_torchao_are_read_without_its_help(mapping, scale, bits, granularity, dtype, monkeypatch):
    base = nn.Linear(64, 24, dtype=dtype)
    ao.quantize_(
        base,
        ao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"), mapping_type=ao.MappingType[mapping], scale_dtype=scale,
            granularity=ao.PerAxis(0) if granularity == "PerRow" else ao.PerGroup(16),
        ),
    )  # fmt: skip
    expected = quantized.dequantize(base).to(dtype)
    kind = quantized.kind_of(base)
    monkeypatch.setattr(type(kind), "dequantize", lambda *_: pytest.fail("torchao was asked"))
    assert torch.equal(kind.in_dtype(base, base.weight, dtype), expected)


@needs_ao
@pytest.mark.filterwarnings("ignore:merging into")
def test_torchao_input_scale_is_part_of_the_weight():
    """SmoothQuant and AWQ put a scale for the input into the weight."""
    base = nn.Linear(41, 24, bias=False)
    scale = normal(41, seed=3).abs() + 0.5
    weight = base.weight.detach() / scale
    base.weight = nn.Parameter(
        ao.Int8Tensor.from_hp(weight, granularity=ao.PerRow(), act_pre_scale=scale), requires_grad=False
    )
    layer = randomize(randlora.Linear(base, r=5, randlora_alpha=0.25, bases=make_bases(41, 24, 5)))
    expected = exact_forward(layer, normal(7, 41))
    assert relative_error(layer(normal(7, 41)), expected) < 1e-6
    layer.merge()
    assert relative_error(layer(normal(7, 41)), expected) < 2e-2


@needs_bnb
@pytest.mark.parametrize("kind", ["nf4", "nf4-flat"])
def test_weights_that_bitsandbytes_repacked_are_unpacked(kind):
    """On CPUs with AVX512-BF16 an eval call rewrites the weight; elsewhere nothing happens and this holds as well."""
    base = make_base(kind, 128, 64).eval()
    before = quantized.dequantize(base)
    with torch.no_grad():
        base(normal(2, 128))
    packed = quantized.dequantize(base)
    torch.testing.assert_close(packed, before, rtol=2**-8, atol=0)  # it rounds the scales to bf16
    layer = randomize(randlora.Linear(base, r=5, randlora_alpha=0.25, bases=make_bases(128, 64, 5)))
    assert torch.equal(quantized.dequantize(base), packed)
    layer.train()
    x = normal(3, 128).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert relative_error(y, exact_forward(layer, x.detach())) < 1e-6
    assert relative_error(x.grad, (packed.double() + reference_update(layer)).sum(0).expand(3, -1)) < 1e-6


@needs_bnb
def test_weights_that_wait_to_be_quantised():
    base = bnb.nn.Linear4bit(41, 24)
    with pytest.raises(ValueError, match=r"the 4-bit base layer has not quantised its weight yet: move it to a device"):
        quantized.dequantize(base)
    layer = randlora.Linear(base, r=5)
    randomize(layer)
    with pytest.raises(ValueError, match="not quantised its weight yet"):
        layer.merge()
    assert not layer.merged
    layer.to("cpu")  # quantises
    assert relative_error(layer(normal(3, 41)), exact_forward(layer, normal(3, 41))) < 1e-6
    with pytest.raises(ValueError, match="the 8-bit base layer has not quantised"):
        quantized.dequantize(bnb.nn.Linear8bitLt(41, 24, has_fp16_weights=False))


def test_ordinary_layers_are_refused():
    base = nn.Linear(3, 4)
    assert not quantized.is_quantized(base) and not quantized.is_quantized(nn.ReLU())
    for function in (quantized.dequantize, lambda b: quantized.requantize(b, b.weight)):
        with pytest.raises(TypeError, match=r"must be quantised by one of the libraries .* got Linear with a weight"):
            function(base)
    with pytest.raises(ValueError, match=r"weight must have shape \[out, in\] = \[24, 41\], got \[41, 24\]"):
        quantized.requantize(make_base(HERE[-1]), normal(41, 24))


@over_kinds
def test_parameters_printing_and_state(kind, capsys):
    layer = make_layer(kind, dtype=torch.bfloat16)
    layer(normal(3, 41, dtype=torch.bfloat16))
    assert "randlora.Linear" in repr(layer) and "in_features=41" in repr(layer)
    assert "41 -> 24" in randlora.explain(layer, tokens=64)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {n.split(".")[0] for n in trained} == {"randlora_lambda", "randlora_gamma"}
    state = {k: v for k, v in layer.state_dict().items() if k.startswith("randlora")}
    other = make_layer(kind, dtype=torch.bfloat16)
    randomize(other, seed=77)
    other.load_state_dict(state, strict=False)
    x = normal(3, 41, dtype=torch.bfloat16)
    assert torch.equal(other(x), layer(x))
    if can_be_copied(kind):
        assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    if kind in ("8bit", "nf4", "nf4-flat", "fp4", "fp4-flat"):  # torchao's linears do not pickle
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@over_kinds
@over("bases", ["dense", "hadamard"])
def test_in_a_model_beside_ordinary_layers(kind, bases, tmp_path):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(9, 41), nn.Tanh(), make_base(kind), nn.Tanh(), nn.Linear(24, 5))

    config = {"target_modules": "all-linear", "r": 4, "randlora_alpha": 1, "kind": bases, "save_projection": False}
    model, x = randlora.get_peft_model(net(), config), normal(3, 9)
    for i in (0, 2, 4):
        randomize(model.model[i], seed=i)
    expected = model(x)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    loaded = randlora.RandLoraModel.from_pretrained(net(), tmp_path)
    assert torch.equal(loaded(x), expected) or kind == "8bit"  # which quantises its input in eval mode
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 2**16
    assert randlora.estimate(net(), config, tokens=3, inputs=x)
    before = parts(model.model[2].base_layer)
    with pytest.warns(UserWarning, match="merging into .* rounds them again"):
        model.merge_adapter()
    assert relative_error(model(x), expected.detach().double()) < 1
    model.unmerge_adapter()
    assert_same_weight(model.model[2].base_layer, before)
    plain = model.unload()
    assert not any(isinstance(module, randlora.Linear) for module in plain.modules())
    assert torch.equal(plain.train()(x), net()(x))
