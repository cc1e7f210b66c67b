"""PEFT's RandLoRA on base layers that are not quite an ``nn.Linear``, or that were put in place after adapting."""

import warnings

import pytest
import torch
from helpers.common import make_base, normal
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

from helpers.peft_models import Layers, adapt, config, randomize  # noqa: E402
from helpers.unusual_linears import Doubled, Plain, Scaled, WithBias, both_ways, make  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402

X = normal(5, 12)


def one(base, **settings):
    return adapt(Layers(layer=base), config("layer", **settings))


def layer_of(model):
    return model.base_model.model.layer


def update(layer, x):
    return sum(x @ layer.get_delta_weight(name).detach().T for name in layer.active_adapters)


def test_further_arguments_reach_the_base_layer():
    layer = layer_of(one(make(Scaled)))
    for _ in both_ways(layer):
        for args, kwargs in (((), {}), ((0.5,), {}), ((), {"scale": 3.0}), ((2.0,), {"shift": 1.0})):
            expected = layer.base_layer(X, *args, **kwargs) + update(layer, X)
            torch.testing.assert_close(layer(X, *args, **kwargs), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer(hidden_states=X, scale=0.5), layer(X, 0.5))
    layer.enable_adapters(False)
    assert torch.equal(layer(X, 0.5), layer.base_layer(X, 0.5))


def test_the_update_is_added_to_the_head_of_a_tuple():
    layer = layer_of(one(make(WithBias)))
    for _ in both_ways(layer):
        y, bias = layer(X)
        torch.testing.assert_close(y, layer.base_layer(X)[0] + update(layer, X), rtol=1e-4, atol=1e-4)
        assert bias is layer.base_layer.bias
        assert layer(X.bfloat16().float())[0].dtype == X.dtype
    layer.enable_adapters(False)
    assert torch.equal(layer(X)[0], layer.base_layer(X)[0])


@pytest.mark.parametrize("cls", [Plain, Scaled, Doubled])
def test_merging_into_a_forward_of_its_own(cls):
    model = one(make(cls))
    expected, weight = model(X), layer_of(model).weight.clone()
    if cls is Doubled:
        with pytest.raises(
            ValueError, match="Doubled with a forward of its own, does more than multiply by its weight: adding"
        ):
            model.merge_adapter()
        assert not layer_of(model).merged and torch.equal(layer_of(model).weight, weight)
    else:
        model.merge_adapter()
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("what", ["lazy", "sizes", "integers"])
def test_layers_that_are_refused_when_adapting(what):
    base = make_base(12, 7)
    if what == "lazy":
        base, reason = nn.LazyLinear(7), "has no size yet"
    elif what == "sizes":
        base.out_features, reason = 9, r"its weight must have shape \[9, 12\], got \[7, 12\]"
    else:
        base.weight = nn.Parameter(base.weight.to(torch.int8), requires_grad=False)
        reason = "must be of a floating dtype, got torch.int8"
    model = Layers(fine=make_base(12, 12), layer=base)
    with integration.enable(), pytest.raises((TypeError, ValueError), match=f"'layer' cannot be adapted: .*{reason}"):
        peft.get_peft_model(model, config("fine", "layer"))
    assert type(model.fine) is nn.Linear and type(model.layer) is type(base)


def test_quantize_dynamic():
    model = adapt(Layers(wide=make_base(12, 17), tall=make_base(17, 7)), config("wide", "tall"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    wide, tall = model.base_model.model.wide, model.base_model.model.tall
    assert callable(wide.base_layer.weight)

    def expected():
        h = wide.base_layer(X) + update(wide, X)
        return tall.base_layer(h) + update(tall, h)

    for _ in both_ways(model):
        torch.testing.assert_close(model(X), expected(), rtol=1e-3, atol=1e-3)
    with pytest.raises(RuntimeError, match="passes no gradient on to its input"):
        model(X).sum().backward()
    for call in (model.merge_adapter, model.merge_and_unload, wide.merge):
        with pytest.raises(TypeError, match="has no tensor as its weight that could be merged into"):
            call()
    assert not wide.merged
    with integration.enable():
        model.add_adapter("b", config("wide", r=3))
    randomize(model, seed=4).set_adapter("b")
    torch.testing.assert_close(wide(X), wide.base_layer(X) + update(wide, X), rtol=1e-3, atol=1e-3)


def test_quantize_of_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model = adapt(Layers(wide=make_base(12, 17), tall=make_base(17, 7)), config("wide", "tall"))
    expected = model(X)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    for _ in both_ways(model):
        assert (model(X) - expected).norm() < 0.02 * expected.norm()


def test_another_base_layer():
    model = one(make_base(12, 7))
    layer = layer_of(model)
    layer.base_layer = nn.Linear(12, 7).requires_grad_(False)
    for _ in both_ways(layer):
        torch.testing.assert_close(layer(X), layer.base_layer(X) + update(layer, X), rtol=1e-4, atol=1e-4)
    layer.merge()
    layer.base_layer = nn.Linear(12, 7).requires_grad_(False)
    with pytest.raises(ValueError, match="has been replaced by another"):
        layer.unmerge()
    layer.base_layer = nn.Linear(12, 24).requires_grad_(False)
    layer.merged_adapters.clear()
    with pytest.raises(ValueError, match="must have the shape that was adapted"):
        layer(X)
