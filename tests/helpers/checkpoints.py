"""What the tests of adapter files share: loading, looking into files, comparing adapters bit for bit."""

import torch
from safetensors import safe_open

import randlora
from helpers.models import layers_of, net
from randlora.checkpoint import layout

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def load(folder, model=None, **arguments):
    return randlora.RandLoraModel.from_pretrained(net() if model is None else model, folder, **arguments)


def keys_of(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return set(file.keys())


def described(folder):
    with layout.open_adapter(folder) as (_, description, _):
        return description


def bases_of(model, name="default"):
    """The bases of an adapter, which all of its layers share."""
    (bases,) = {id(layer.bases[name]): layer.bases[name] for layer in layers_of(model, name).values()}.values()
    return bases


def assert_same_numbers(model, other, name="default", other_name="default"):
    """Same layers, parameters bit for bit, and the same bases, bit for bit."""
    ours, theirs = layers_of(model, name), layers_of(other, other_name)
    assert ours.keys() == theirs.keys()
    for path, layer in ours.items():
        twin = theirs[path]
        assert torch.equal(layer.randlora_lambda[name], twin.randlora_lambda[other_name]), path
        assert torch.equal(layer.randlora_gamma[name], twin.randlora_gamma[other_name]), path
        assert layer.scaling[name] == twin.scaling[other_name] and layer.num_bases[name] == twin.num_bases[other_name]
        M, n = max(layer.in_features, layer.out_features), layer.num_bases[name]
        m = min(layer.in_features, layer.out_features)
        for side, part in (("A", (..., slice(m))), ("B", (slice(M), slice(n)))):
            a, b = (getattr(x.bases[key].to(torch.float32), side) for x, key in ((layer, name), (twin, other_name)))
            assert torch.equal(a[part], b[part]), (path, side)
