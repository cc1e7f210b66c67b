"""Sums of adapters that are adapters again, and those that are not."""

import pytest
import torch
from helpers.models import (
    IDS,
    adapt,
    add,
    assert_unchanged,
    layers_of,
    net,
    randomize,
    snapshot,
)
from torch.testing import assert_close

from randlora import RandLoraModel


def same_gamma(model, *names):
    with torch.no_grad():
        for layer in layers_of(model).values():
            here = [name for name in names if name in layer.randlora_gamma]
            for name in here[1:]:
                layer.randlora_gamma[name].copy_(layer.randlora_gamma[here[0]])


def test_weighted_adapter():
    """Equal gammas; alphas and targets differ."""
    model = adapt(net(), target_modules=["q_proj", "up_proj"])
    add(model, "b", 2, randlora_alpha=7, target_modules=["v_proj", "up_proj"])
    same_gamma(model, "default", "b")
    model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "sum")
    assert model.active_adapters == ["default"]
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".sum"))
    for path, layer in layers_of(model).items():
        parts = {"default": 0.5, "b": -2.0}
        expected = sum(w * layer.get_delta_weight(n) for n, w in parts.items() if n in layer.randlora_lambda)
        assert_close(layer.get_delta_weight("sum"), expected, msg=path)
    config = model.peft_config["sum"]
    assert sorted(config.target_modules) == sorted(layers_of(model))
    fresh = randomize(adapt(net()).__class__(net(), config, "sum"), "sum")
    assert {p: layer.scaling["sum"] for p, layer in layers_of(model).items()} == {
        p: layer.scaling["sum"] for p, layer in layers_of(fresh).items()
    }


def test_weighted_adapter_of_equal_lambdas_and_of_one(tmp_path):
    model = adapt(net())
    add(model, "b", 2)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.randlora_lambda["b"].copy_(layer.randlora_lambda["default"])
    model.add_weighted_adapter(["default", "b"], [2, 3], "sum")
    model.add_weighted_adapter(["b"], [-1], "minus")
    layer = model.model.layers[1].down_proj
    assert_close(layer.get_delta_weight("sum"), 2 * layer.get_delta_weight("default") + 3 * layer.get_delta_weight("b"))
    assert_close(layer.get_delta_weight("minus"), -layer.get_delta_weight("b"))
    model.save_pretrained(tmp_path, ["sum"])
    model.set_adapter("sum")
    assert_close(RandLoraModel.from_pretrained(net(), tmp_path / "sum")(IDS), model(IDS))


@pytest.mark.parametrize(
    ("settings", "arguments", "named"),
    [
        ({}, (["default", "b"], [1, 1]), "neither the gammas nor the lambdas"),
        ({"projection_prng_key": 1}, (["default", "b"], [1, 1]), "have different bases"),
        ({"r": 3}, (["default", "b"], [1, 1]), "have different bases"),
        ({"kind": "sign", "target_modules": ["head"]}, (["default", "b"], [1, 1]), "have different bases"),
        ({"num_bases": 2}, (["default", "b"], [1, 1]), "different num_bases"),
        ({"modules_to_save": ["head"]}, (["default", "b"], [1, 1]), "modules_to_save or bias"),
        ({"bias": "all"}, (["b"], [1]), "modules_to_save or bias"),
        ({"randlora_alpha": 0}, (["b", "default"], [1, 1]), "randlora_alpha = 0"),
        ({}, (["default"], [1, 2]), "as many"),
        ({}, ([], []), "at least one"),
        ({}, (["b", "b"], [1, 1]), "each once"),
        ({}, (["c"], [1]), "no adapter named 'c'"),
        ({}, (["b"], [float("nan")]), "weights"),
    ],
)
def test_sums_that_are_no_adapter(settings, arguments, named):
    model = adapt(net())
    add(model, "b", 2, **settings)
    before = snapshot(model)
    with pytest.raises(ValueError, match=named):
        model.add_weighted_adapter(*arguments, "sum")
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="already has an adapter named 'b'"):
        model.add_weighted_adapter(["default"], [1], "b")


def test_numbers_on_meta_are_not_added_up():
    model = adapt(net().to("meta"))
    with pytest.raises(ValueError, match="is on the meta device"):
        model.add_weighted_adapter(["default"], [2.0], "sum")
    assert list(model.peft_config) == ["default"]
