"""Metadata and configs that are damaged or lost: an error that names the file and the reason."""

import json
import shutil

import pytest
import torch
from helpers.damaged import CONFIG, WEIGHTS, assert_refused, edit_config, tensors_of
from helpers.models import IDS, adapt, net
from safetensors.torch import save_file

import randlora

# ---- the metadata ----------------------------------------------------------------------------------------------------


def change_metadata(folder, change):
    tensors, metadata = tensors_of(folder)
    said = json.loads(metadata["randlora"])
    change(said)
    save_file(tensors, folder / WEIGHTS, {"randlora": json.dumps(said)})


def test_a_newer_format(folder):
    change_metadata(folder, lambda said: said.update(format=2))
    assert_refused(folder, "format 2, of a newer randlora; this one reads up to 1: update it")


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said.pop("config"),
        lambda said: said["config"].pop("r"),
        lambda said: said.update(format="1"),
        lambda said: said.update(format=True),
        lambda said: said.update(dims=[1, 2]),
        lambda said: said.update(dims=[1, 2, -3]),
        lambda said: said.update(dims="abc"),
        lambda said: said.update(fingerprint=7),
        lambda said: said.update(more=1),
    ],
)
def test_damaged_metadata(folder, change):
    change_metadata(folder, change)
    assert_refused(folder, "its metadata is damaged")


@pytest.mark.parametrize(
    ("width", "message"),
    [
        (None, "does not say the group_width of its hadamard bases"),
        ("gone", "does not say the group_width of its hadamard bases"),
        (16, "group_width must be 8, 4, 2 or 1, got 16"),
        (0, "group_width must be 8, 4, 2 or 1, got 0"),
        ("4", "group_width must be 8, 4, 2 or 1, got '4'"),
        (1, "checksum does not match"),
    ],
)
def test_a_group_width_that_is_not_known(width, message, tmp_path):
    """Bases of another width would be other bases."""
    model = adapt(net(), kind="hadamard", save_projection=False)
    assert model.peft_config["default"].group_width == 4
    model.save_pretrained(tmp_path)

    def change(said):
        said["config"].pop("group_width") if width == "gone" else said["config"].update(group_width=width)

    edit_config(tmp_path, group_width=None if width == "gone" else width)
    change_metadata(tmp_path, change)
    assert_refused(tmp_path, message)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"x"', "[" * 100000, "{}"], ids=lambda t: t[:9] or "empty"
)
def test_metadata_that_is_no_description(folder, text):
    tensors, _ = tensors_of(folder)
    save_file(tensors, folder / WEIGHTS, {"randlora": text})
    assert_refused(folder, "its metadata is damaged")


def test_lost_metadata(folders, folder, tmp_path):
    """A file that another program wrote anew: with its projections it is as good as PEFT's; without, it is refused."""
    tensors, _ = tensors_of(folder)
    save_file(tensors, folder / WEIGHTS)
    expected = randlora.RandLoraModel.from_pretrained(net(), folders / "ours")(IDS)
    again = randlora.RandLoraModel.from_pretrained(net(), folder)
    torch.testing.assert_close(again(IDS), expected, rtol=1e-12, atol=1e-12)
    small = shutil.copytree(folders / "ours_small", tmp_path / "small")
    save_file(tensors_of(small)[0], small / WEIGHTS)
    assert_refused(small, "has lost the metadata that its bases are made from")


# ---- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no valid JSON"),
        (b"{", "no valid JSON"),
        (b"\xff\xfe{}", "no valid JSON"),
        (b"[1]", "no valid JSON: a JSON object was expected, got list"),
        (b"null", "a JSON object was expected"),
        (b'{"r": ' + b"9" * 5000 + b"}", "no valid JSON"),
    ],
    ids=["empty", "cut", "not-utf8", "list", "null", "long-number"],
)
def test_a_config_that_is_no_json(folder, content, message):
    (folder / CONFIG).write_bytes(content)
    assert_refused(folder, message)
    with pytest.raises(ValueError, match=message):
        randlora.RandLoraConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type must be RANDLORA, got 'LORA': this is another method's adapter"),
        ({"peft_type": None}, "peft_type"),
        ({"target_modules": 5}, "target_modules must be a list of names"),
        ({"target_modules": ["q_proj", 5]}, "target_modules"),
        ({"target_modules": "("}, "target_modules"),
        ({"target_modules": []}, "target_modules must name at least one layer"),
        ({"layers_to_transform": 1.5}, "layers_to_transform"),
        ({"randlora_dropout": "0.1"}, "randlora_dropout must be a number"),
        ({"bias": "some"}, "bias must be one of"),
        ({"task_type": ["x"]}, "task_type"),
        ({"modules_to_save": "head"}, "modules_to_save must be a list"),
        ({"modules_to_save": ["tail"]}, "modules_to_save: 'tail' matches no module"),
        ({"use_magic": True}, "use_magic: not known to this version"),
    ],
    ids=str,
)
def test_a_config_with_wrong_values(folder, peft_folder, changes, message):
    for path in (folder, peft_folder):
        edit_config(path, **changes)
        assert_refused(path, message)


def test_no_config(folder, peft_folder):
    (peft_folder / CONFIG).unlink()
    assert_refused(peft_folder, "adapter_config.json: cannot be read: No such file")
    (folder / CONFIG).unlink()
    randlora.RandLoraModel.from_pretrained(net(), folder)
    (folder / CONFIG).mkdir()
    assert_refused(folder, "adapter_config.json: cannot be read: Is a directory")
