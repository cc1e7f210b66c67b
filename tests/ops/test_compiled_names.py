"""Names in configs and files are those of a model that is not compiled, whether the one at hand is or not."""

import pytest
import torch
from helpers.checkpoints import CONFIG, WEIGHTS, keys_of, load
from helpers.damaged import tensors_of
from helpers.models import IDS, SETTINGS, adapt, net, randomize
from safetensors.torch import save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import randlora


def compiled(module):
    return torch.compile(module, backend="eager")


def part(name, wrap):
    model = net()
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, wrap(model.get_submodule(name)))
    return model


WAYS = {
    "plain": net,
    "whole": lambda: compiled(net()),
    "twice": lambda: compiled(part("layers.1", compiled)),
    "block": lambda: part("layers.0", compiled),
    "saved": lambda: part("head", compiled),
    "checkpointed": lambda: part("layers.0", checkpoint_wrapper),
    "checkpointed layer": lambda: part("layers.1.q_proj", checkpoint_wrapper),
}


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("way", WAYS)
def test_files_do_not_depend_on_it(tmp_path, way):
    plain = adapt(net(), modules_to_save=["head"], bias="all")
    plain.save_pretrained(tmp_path / "plain")
    model = adapt(WAYS[way](), modules_to_save=["head"], bias="all")
    model.save_pretrained(tmp_path / "a")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    again = load(tmp_path / "plain", WAYS[way]())
    for found in (model, again):
        torch.testing.assert_close(found(IDS), plain(IDS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("projections", [True, False])
def test_keys_as_peft_writes_them(tmp_path, projections):
    """Of a compiled base, with the part of the name in them; onto plain and compiled ones."""
    adapt(net(), modules_to_save=["head"], prng="peft", save_projection=projections).save_pretrained(tmp_path)
    expected = load(tmp_path)(IDS)
    tensors, _ = tensors_of(tmp_path)
    assert keys_of(tmp_path) == set(tensors)
    named = {key.replace("base_model.model.", "base_model.model._orig_mod."): t for key, t in tensors.items()}
    save_file(named, tmp_path / WEIGHTS, {"format": "pt"})
    for way in WAYS.values():
        with pytest.warns(UserWarning, match="no projections") if not projections else _nothing():
            torch.testing.assert_close(load(tmp_path, way())(IDS), expected, rtol=1e-12, atol=1e-12)
    key = "base_model.model.layers.0.q_proj.randlora_lambda"
    save_file(named | {key: tensors[key].clone()}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=f"holds {key} twice"):
        load(tmp_path)


class _nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r"layers\.\d\.q_proj"},
        {"target_modules": ["layers.0.q_proj", "layers.1.up_proj"]},
        {"target_modules": "all-linear", "exclude_modules": r"layers\.0\..*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": "all-linear", "modules_to_save": ["layers.1.q_proj"]},
    ],
    ids=str,
)
def test_configs_do_not_depend_on_it(settings):
    found = {}
    for name, make in WAYS.items():
        if name in ("saved", "checkpointed layer"):
            continue
        model = adapt(make(), **settings)
        found[name] = randomize(model).eval()(IDS)
    for value in found.values():
        torch.testing.assert_close(value, found["plain"], rtol=1e-12, atol=1e-12)


def test_compiled_and_called_before():
    """What was compiled for the layers as they were is not called again."""
    model = compiled(net())
    model(IDS)
    adapted = adapt(model)
    torch.testing.assert_close(adapted(IDS), adapt(net())(IDS), rtol=1e-12, atol=1e-12)
    plain = adapted.merge_and_unload()
    torch.testing.assert_close(plain(IDS), adapt(net())(IDS), rtol=1e-12, atol=1e-12)


def test_a_layer_that_is_compiled_by_itself():
    """torch.compile would go on calling the layer that it was given."""
    for target in (["q_proj"], "all-linear", r".*q_proj"):
        with pytest.raises(ValueError, match=r"'layers.0.q_proj', which torch.compile has compiled by itself"):
            adapt(part("layers.0.q_proj", compiled), target_modules=target)
    adapt(part("layers.0.q_proj", compiled), target_modules=["v_proj"])
    linear = compiled(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="compiled by itself"):
        randlora.get_peft_model(linear, {"r": 1, "target_modules": "all-linear"})


def test_a_compiled_wrapper(tmp_path):
    model = adapt(net())
    wrapper = compiled(model)
    expected = wrapper(IDS)
    wrapper.save_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", state_dict=wrapper.state_dict())
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    wrapper.load_adapter(tmp_path / "b", "second")
    wrapper.set_adapter("second")
    torch.testing.assert_close(wrapper(IDS), expected)
    with pytest.raises(ValueError, match="adapted already"):
        randlora.get_peft_model(wrapper, SETTINGS)
    merged = wrapper.merge_and_unload()
    torch.testing.assert_close(merged(IDS), expected)
