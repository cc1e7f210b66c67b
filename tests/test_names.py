"""Names of adapters: refused when the adapter is made, wherever that is, if no folder can have them; else they work."""

import warnings

import pytest
import torch
from helpers.checkpoints import load
from helpers.models import adapt, assert_unchanged, net, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora

BAD = {
    "empty": "",
    "dot": "a.b",
    "up": "..",
    "slash": "a/b",
    "backslash": "a\\b",
    "base": "__base__",
    "nul": "a\0b",
    "newline": "a\nb",
    "tab": "\t",
    "escape": "\x1b[31m",
    "delete": "a\x7f",
    "c1": "a\x85",
    "surrogate": "a\ud800",
    "surrogate-escape": b"\xff".decode(errors="surrogateescape"),
    "long": "x" * 201,
    "long-utf8": "é" * 101,
    "integer": 3,
    "bytes": b"a",
    "none": None,
}
GOOD = ["a b", "-", "naïve", "模型", "é" * 100, "x" * 200, "0", "a:b*c?", " ", "~", "$HOME", "e\u0301"]


def made(tmp_path):
    """Every place where the name of a new adapter comes in: call, and the model or layer that it would change."""
    adapt(net()).save_pretrained(tmp_path)
    plain, other, layer, attention = net(), net(), nn.Linear(3, 4), nn.MultiheadAttention(4, 2)
    models = [adapt(net()) for _ in range(3)]
    adapted = randlora.Linear(nn.Linear(3, 4), r=2)
    own = randlora.MultiheadAttention(nn.MultiheadAttention(4, 2), r=2)
    config = {"r": 2, "target_modules": ["q_proj"]}
    return [
        (plain, lambda name: randlora.get_peft_model(plain, config, name)),
        (models[0], lambda name: models[0].add_adapter(name, config)),
        (models[1], lambda name: models[1].add_weighted_adapter(["default"], [1.0], name)),
        (models[2], lambda name: models[2].load_adapter(tmp_path, name)),
        (other, lambda name: randlora.RandLoraModel.from_pretrained(other, tmp_path, name)),
        (layer, lambda name: randlora.Linear(layer, name, r=2)),
        (adapted, lambda name: adapted.update_layer(name, r=2)),
        (attention, lambda name: randlora.MultiheadAttention(attention, name, r=2)),
        (own, lambda name: own.add_adapter(name, r=2)),
    ]


@pytest.mark.parametrize("name", BAD.values(), ids=BAD.keys())
def test_refused_when_the_adapter_is_made(tmp_path, name):
    for target, call in made(tmp_path):
        before = snapshot(target)
        with pytest.raises((ValueError, TypeError), match="adapter_name must"):
            call(name)
        assert_unchanged(target, before)


@pytest.mark.parametrize("name", GOOD)
def test_what_a_folder_can_be_called_works(tmp_path, name):
    for _, call in made(tmp_path):
        call(name)
    model = adapt(net(), name)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved" / name, adapter_name=name)
    x = torch.ones(2, 3, dtype=torch.long)
    assert torch.equal(again(x), model.eval()(x))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(name=st.text(st.characters(), max_size=250) | st.text("ab\0\n/\\.é\ud800", max_size=5))
def test_a_name_that_is_taken_names_a_folder(tmp_path_factory, name):
    layer = randlora.Linear(nn.Linear(2, 2), r=1)
    try:
        layer.update_layer(name, r=1)
    except ValueError as error:
        assert ("already has an adapter" if name == "default" else "adapter_name") in str(error)
        assert list(layer.randlora_lambda) == list(layer.r) == ["default"]
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder = tmp_path_factory.getbasetemp() / "names" / name
        folder.mkdir(parents=True, exist_ok=True)
    assert folder.resolve().parent == (tmp_path_factory.getbasetemp() / "names").resolve()
