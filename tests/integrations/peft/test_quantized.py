"""PEFT's RandLoRA on 8-bit and 4-bit layers of bitsandbytes: what PEFT gets wrong there, and training."""

import copy
import warnings

import pytest
import torch
from helpers.common import normal, over

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
bnb = pytest.importorskip("bitsandbytes")
from helpers.peft_models import KINDS, adapt, config, layers, llama, logits, randomize, tokens  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402
from randlora.integrations.peft import layer as peft_layer  # noqa: E402
from randlora.layers import quantized  # noqa: E402

SHAPES = {"wide": (64, 128), "tall": (128, 64), "square": (64, 64)}


def quantize(model, bits):
    """`model` with quantised linear layers, marked as transformers marks it."""
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if type(child) is not torch.nn.Linear or key == "lm_head":
                continue
            size, bias = (child.in_features, child.out_features), child.bias is not None
            if bits == 8:
                new = bnb.nn.Linear8bitLt(*size, bias=bias, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(child.weight.data, requires_grad=False, has_fp16_weights=False)
            else:
                new = bnb.nn.Linear4bit(*size, bias=bias, compute_dtype=child.weight.dtype, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4", module=new)
            new.bias = child.bias
            setattr(module, key, new.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def one_layer(bits, shape, accelerated=True, dtype=torch.float32, kind="dense"):
    return adapt(quantize(layers(dtype, layer=SHAPES[shape]), bits), config("layer", r=8, **KINDS[kind]), accelerated)


bits_and_shapes = [
    pytest.mark.parametrize("shape", SHAPES),
    pytest.mark.parametrize("bits", [8, 4]),
]


def over_bits_and_shapes(test):
    for mark in bits_and_shapes:
        test = mark(test)
    return test


@over("dtype", (torch.float32, torch.bfloat16))
@over_bits_and_shapes
def test_forward_and_gradients(bits, shape, dtype):
    """Fact 10: the output has the input's dtype. The update and its gradients are those of a float layer."""
    model = one_layer(bits, shape, dtype=dtype)
    layer, x = model.base_model.model.layer, normal(5, SHAPES[shape][0], seed=9, dtype=dtype).requires_grad_()
    y = layer(x)
    base = layer.base_layer(x)
    assert y.dtype == base.dtype == dtype
    update = x.double() @ layer.get_delta_weight("default").double().T
    limit = {torch.float32: 1e-4, torch.bfloat16: 0.02}[dtype] * update.abs().max()
    assert (y.double() - base.double() - update).abs().max() <= limit + 0.01 * base.abs().max() * (
        dtype != torch.float32
    )
    g = normal(*y.shape, seed=10, dtype=dtype)
    parameters = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    got = torch.autograd.grad(y, parameters, g)
    expected = torch.autograd.grad(update, parameters, g.double())
    for a, b in zip(got, expected, strict=True):
        assert (a - b).abs().max() <= {torch.float32: 1e-4, torch.bfloat16: 0.03}[dtype] * b.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@over_bits_and_shapes
def test_like_pefts_forward(bits, shape, kind):
    theirs = one_layer(bits, shape, False, kind=kind)
    x = normal(5, SHAPES[shape][0], seed=9)
    plain = theirs(x)
    assert type(theirs.base_model.model.layer).__name__ in ("Linear8bitLt", "Linear4bit", "Linear")
    ours = integration.accelerate(copy.deepcopy(theirs))
    assert isinstance(ours.base_model.model.layer, peft_layer.AcceleratedLinear)
    assert (ours.base_model.model.layer.pattern("default") is None) == (kind == "dense")
    torch.testing.assert_close(ours(x), plain, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(one_layer(bits, shape, kind=kind)(x), plain, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:merging into")
@over_bits_and_shapes
def test_merge(bits, shape):
    """Fact 9: PEFT's raises for wide and tall layers, and for square ones adds another matrix."""
    model = one_layer(bits, shape)
    layer, x = model.base_model.model.layer, normal(5, SHAPES[shape][0], seed=9)
    before, weight, y = quantized.dequantize(layer.base_layer), layer.base_layer.weight, layer(x)
    update = layer.get_delta_weight("default")
    model.merge_adapter()
    got = quantized.dequantize(layer.base_layer) - before
    step = (before + update).abs().amax(1, keepdim=True) / 127 if bits == 8 else (before + update).abs().max() / 6
    assert ((got - update).abs() <= 1.01 * step).all()
    assert (layer(x) - y).norm() < 0.2 * y.norm() and not torch.equal(layer(x), y)
    model.unmerge_adapter()
    assert layer.base_layer.weight is weight
    assert torch.equal(quantized.dequantize(layer.base_layer), before)
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_second_adapter_does_not_nest(bits):
    """Fact 11."""
    for accelerated in (False, True):
        model = one_layer(bits, "wide", accelerated)
        model.add_adapter("other", config("layer", r=4))
        layer = model.base_model.model.layer
        nested = isinstance(layer.base_layer, peft.tuners.randlora.RandLoraLayer)
        flat = isinstance(layer, peft_layer.AcceleratedLinear) or type(layer) is peft.tuners.randlora.Linear
        assert nested != flat and (flat or not accelerated)
        if nested:
            with pytest.raises(ValueError, match="layer around another one"):
                integration.accelerate(model)
    randomize(model)
    x, first = normal(5, 64, seed=9), model(normal(5, 64, seed=9))
    model.set_adapter("other")
    assert not torch.allclose(model(x), first)
    model.set_adapter("default")
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("bits", [8, 4])
def test_kbit_training(bits):
    """``prepare_model_for_kbit_training`` and a few steps, with gradient checkpointing, next to PEFT's own."""
    runs = []
    for accelerated in (False, True):
        model = quantize(llama(), bits)
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
        model = adapt(model, config("q_proj", "v_proj", "down_proj"), accelerated).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(6):
            loss = model(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(loss.item())
        runs.append(torch.tensor(losses))
    assert runs[1][0] - runs[1][-1] > 0.3
    torch.testing.assert_close(*runs, rtol=0, atol=0.02)


@pytest.mark.parametrize("bits", [8, 4])
def test_files(bits, tmp_path):
    theirs = adapt(quantize(llama(), bits), config("q_proj", "v_proj"), False)
    theirs.save_pretrained(tmp_path)
    with integration.enable(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as missing keys
        found = peft.PeftModel.from_pretrained(quantize(llama(), bits), tmp_path)
    # bitsandbytes' own fast path for eval on the CPU cannot do these sizes.
    torch.testing.assert_close(logits(found.train()), logits(theirs.train()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_layers_are_of_pefts_classes(bits, tmp_path):
    """As ``isinstance`` sees it, in scripts that look for quantised layers; made new, converted, copied and pickled."""
    theirs, ours = (one_layer(bits, "wide", accelerated) for accelerated in (False, True))
    cls = type(theirs.base_model.model.layer)
    assert cls is getattr(peft.tuners.randlora, {8: "Linear8bitLt", 4: "Linear4bit"}[bits])
    x = normal(3, 64, seed=1)
    torch.save(ours.base_model.model.layer, tmp_path / "layer.pt")
    wanted = integration.accelerate(copy.deepcopy(theirs)).base_model.model.layer(x)
    ours.add_adapter("second", config("layer", r=4))
    for layer in (
        ours.base_model.model.layer,
        integration.accelerate(theirs).base_model.model.layer,
        copy.deepcopy(ours).base_model.model.layer,
        torch.load(tmp_path / "layer.pt", weights_only=False),
    ):
        assert isinstance(layer, cls) and isinstance(layer, peft_layer.AcceleratedLinear)
        assert type(layer).__name__ == cls.__name__ and repr(layer).startswith("randlora.Linear(")
        torch.testing.assert_close(layer(x), wanted)
    assert integration.accelerate(theirs) is theirs
