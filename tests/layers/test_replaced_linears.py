"""Base layers that are put in place of others after adapting: by quantize_dynamic, torchao, or by hand."""

import copy
import warnings

import pytest
import torch
from helpers.common import make_base, make_layer, normal, randomize
from helpers.unusual_linears import ON_CPU, Plain, both_ways, make, update, wrap
from torch import nn

import randlora


def sequence():
    model = nn.Sequential(make_base(12, 7), nn.Tanh(), make_base(7, 12))
    model = randlora.get_peft_model(model, {"target_modules": ["0", "2"], **ON_CPU})
    for i in (0, 2):
        randomize(model.model[i])
    return model


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(sequence(), {nn.Linear})


def test_quantize_dynamic():
    model, x = quantised(), normal(5, 12)
    for _ in both_ways(model):
        y = x
        for i in range(3):
            layer = model.model[i]
            y = layer.base_layer(y) + update(layer, y) if i != 1 else layer(y)
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4)
    names = ["default", "__base__", "default", "__base__", "default"]
    assert model(x, adapter_names=names).shape == (5, 12)
    assert "12 -> 7" in randlora.explain(model.model[0], 10)
    model.add_adapter("b", {"target_modules": ["0"], "r": 3})
    randomize(model.model[0])
    model.set_adapter(["default", "b"])
    first = model.model[0]
    expected = first.base_layer(x) + update(first, x) + update(first, x, "b")
    torch.testing.assert_close(first(x), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(model(x), model.model[2].base_layer(torch.tanh(first.base_layer(x))))


def test_quantize_dynamic_is_not_merged_into():
    model = quantised()
    before = model(normal(5, 12))
    for call in (model.merge_adapter, model.merge_and_unload, model.model[0].merge):
        with pytest.raises(TypeError, match="has no tensor as its weight that could be merged into"):
            call()
    assert torch.equal(model(normal(5, 12)), before)
    plain = model.unload()
    assert not any(isinstance(module, randlora.Linear) for module in plain.modules())


def test_quantize_dynamic_gives_no_wrong_gradients():
    model, x = quantised(), normal(5, 12)
    with pytest.raises(RuntimeError, match="passes no gradient on to its input"):
        model(x).sum().backward()
    model.model[0](x).sum().backward()  # nothing lies before it
    assert model.model[0].randlora_lambda["default"].grad.any()


def test_outputs_of_quantize_dynamic_can_be_changed_in_place():
    model, x = quantised(), normal(5, 12).requires_grad_()
    for names in (["__base__"] * 5, ["default"] * 5, None):
        y = model(x, adapter_names=names)
        expected = y.detach() * 2
        y.mul_(2)
        assert y.requires_grad and torch.equal(y, expected)


def test_quantize_dynamic_of_merged_layers():
    model, x = sequence(), normal(5, 12)
    expected = model(x)
    model.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert (model(x) - expected).norm() < 0.03 * expected.norm()
    for call in (model.unmerge_adapter, model.unload, lambda: model.set_adapter("default")):
        with warnings.catch_warnings(), pytest.raises(ValueError, match="has been replaced by another"):
            warnings.simplefilter("ignore")
            call()
    assert model.model[0].merged


def test_quantize_of_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model, x = sequence(), normal(5, 12)
    expected = model(x)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert type(model.model[0]) is randlora.Linear
    assert type(model.model[0].base_layer.weight) is not nn.Parameter
    for _ in both_ways(model):
        assert (model(x) - expected).norm() < 0.02 * expected.norm()


def test_quantize_of_torchao_on_merged_layers():
    torchao = pytest.importorskip("torchao.quantization")
    model, x = sequence(), normal(5, 12)
    model.merge_adapter()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    expected = model(x)
    for call in (model.unmerge_adapter, model.unload, model.model[0].unmerge):
        with pytest.raises(ValueError, match="merged into a weight that has been quantised since"):
            call()
    assert model.model[0].merged and torch.equal(model(x), expected)


def test_assigning_a_weight_to_an_adapted_layer():
    layer = wrap(make_base(12, 7))
    weight, bias = nn.Parameter(normal(7, 12, seed=8)), nn.Parameter(normal(7, seed=9))
    layer.weight, layer.bias = weight, bias
    assert layer.base_layer.weight is weight and layer.base_layer.bias is bias
    assert "weight" not in layer._parameters and "bias" not in layer._parameters
    x = normal(3, 12)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + update(layer, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [nn.Linear, Plain])
@pytest.mark.parametrize("sizes", [(12, 9), (12, 24), (24, 7), (12, 1)])
def test_a_base_layer_of_another_size(cls, sizes):
    layer = make_layer(12, 7, bases=randlora.RandomBases(24, 24, 5))
    layer.base_layer = make(cls, *sizes)
    for _ in both_ways(layer):
        with pytest.raises((ValueError, RuntimeError), match="shape"):
            layer(normal(3, sizes[0]))
    with pytest.raises(ValueError, match=r"must have a weight of shape \[7, 12\] to merge into"):
        layer.merge()
    assert not layer.merged


def test_another_base_layer_of_the_same_size():
    layer, x = wrap(make_base(12, 7)).eval(), normal(3, 12)
    with torch.no_grad():
        for _ in range(3):
            layer(x)
        layer.base_layer = nn.Linear(12, 7).requires_grad_(False)
        for _ in range(3):
            torch.testing.assert_close(layer(x), layer.base_layer(x) + update(layer, x), rtol=1e-4, atol=1e-4)
    layer.merge()
    layer.base_layer = other = nn.Linear(12, 7)
    weight = other.weight.clone()
    with pytest.raises(ValueError, match="has been replaced by another"):
        layer.unmerge()
    assert layer.merged and torch.equal(other.weight, weight)


def test_a_merged_layer_that_is_copied_is_unmerged():
    layer = wrap(make_base(12, 7))
    layer.merge()
    twin = copy.deepcopy(layer)
    twin.unmerge()
    assert torch.equal(twin.weight, make_base(12, 7).weight) and layer.merged


def test_a_base_layer_of_bitsandbytes():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer, x = wrap(make_base(64, 64)), normal(3, 64)
    other = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    other.load_state_dict(layer.base_layer.state_dict())
    layer.base_layer = other.to("cpu").requires_grad_(False)
    for _ in both_ways(layer):
        torch.testing.assert_close(layer(x), other(x) + update(layer, x), rtol=1e-4, atol=1e-4)
