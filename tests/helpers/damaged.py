"""Adapters to be damaged, and what must hold when they are: refused by name, and nothing changed."""

import json
import struct
import warnings

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import randlora
from helpers.models import adapt, add, assert_unchanged, net, snapshot

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TARGETS = {"target_modules": ["q_proj", "up_proj"], "r": 4}


def make_adapters(root):
    """Folders in `root` with adapters as we and as PEFT write them, with and without projections."""
    adapt(net(), **TARGETS, modules_to_save=["head"], bias="all").save_pretrained(root / "ours")
    adapt(net(), **TARGETS, save_projection=False, kind="sparse").save_pretrained(root / "ours_small")
    for name, with_projections in (("peft", True), ("peft_small", False)):
        adapt(net(), **TARGETS, prng="peft", save_projection=with_projections).save_pretrained(root / name)
        save_file(load_file(root / name / WEIGHTS), root / name / WEIGHTS, {"format": "pt"})
    return root


def assert_refused(folder, message, model=net):
    """By from_pretrained and by load_adapter, and by neither is anything changed."""
    plain, adapted = model(), add(adapt(net(), randlora_dropout=0.1), "b", 2, r=3)
    adapted.model.layers[0].eval()
    for target, call in (
        (plain, lambda: randlora.RandLoraModel.from_pretrained(plain, folder)),
        (adapted, lambda: adapted.load_adapter(folder, "c")),
    ):
        if target is adapted and model is not net:
            continue
        before = snapshot(target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=message) as caught:
                call()
        assert str(folder) in str(caught.value), "the message names the file"
        assert_unchanged(target, before)


def read_header(path):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tensors_of(folder):
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {key: file.get_tensor(key).clone() for key in file.keys()}, file.metadata()  # noqa: SIM118


def edit_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value != "-"}))
