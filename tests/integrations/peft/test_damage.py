"""With randlora enabled PEFT finds damage in files that randlora wrote, and loads between compiled and plain models."""

import contextlib
import json
import os
import shutil
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
from helpers.damaged import CONFIG, WEIGHTS, edit_config, read_header, tensors_of  # noqa: E402
from helpers.models import IDS, adapt, net  # noqa: E402
from helpers.peft_models import config, randomize  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402

TARGETS = {"target_modules": ["q_proj", "up_proj"], "r": 4}
KINDS = {
    "peft": {"prng": "peft"},
    "peft, no projections": {"prng": "peft", "save_projection": False},
    "peft, sparse": {"prng": "peft", "kind": "very_sparse"},
    "philox": {},
    "philox, sparse": {"kind": "sparse"},
    "philox, very sparse": {"kind": "very_sparse"},
}


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """A folder with an adapter, and what its model gives."""
    folder = tmp_path_factory.mktemp("ours") / "adapter"
    model = adapt(net(), **TARGETS, modules_to_save=["head"], **KINDS[request.param])
    model.save_pretrained(folder, for_peft=True)
    return folder, model.eval()(IDS).detach()


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written[0], tmp_path / "adapter")


def load(folder, model=None, **arguments):
    with integration.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, that the copies per layer are missing
        return peft.PeftModel.from_pretrained(net() if model is None else model, folder, **arguments)


def test_whole_files_load(written):
    folder, expected = written
    for arguments in ({}, {"low_cpu_mem_usage": True}, {"adapter_name": "other"}):
        torch.testing.assert_close(load(folder, **arguments)(IDS), expected, rtol=1e-5, atol=1e-5)


def places(path):
    """For every tensor a byte of it that changes a value, and bytes of the metadata."""
    data = path.read_bytes()
    header, tensors = read_header(path)
    start = len(data) - len(tensors)
    header.pop("__metadata__")
    found = {
        key: start + (a + b) // 2 // 8 * 8 + 2 for key, entry in header.items() for a, b in [entry["data_offsets"]]
    }
    return found | {"fingerprint": data.index(b"fingerprint") + 20, "sha256": data.index(b"sha256") + 20}


def test_every_tensor_is_checked(folder):
    """Projections too: PEFT computes with them."""
    data = (folder / WEIGHTS).read_bytes()
    for key, place in places(folder / WEIGHTS).items():
        (folder / WEIGHTS).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged"):
            load(folder)
        assert key
    (folder / WEIGHTS).write_bytes(data)
    model = load(folder)
    place = places(folder / WEIGHTS)["base_model.model.layers.0.q_proj.randlora_gamma"]
    (folder / WEIGHTS).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
    with integration.enable(), pytest.raises(ValueError, match="its checksum does not match"):
        model.load_adapter(folder, "second")


@pytest.mark.parametrize("written", [kind for kind in KINDS if "no projections" not in kind], indirect=True)
def test_a_projection_that_is_lost_or_of_another_shape(folder):
    tensors, metadata = tensors_of(folder)
    for key in ("base_model.randlora_A", "base_model.randlora_B"):
        save_file({k: t for k, t in tensors.items() if k != key}, folder / WEIGHTS, metadata)
        with pytest.raises(ValueError, match="is damaged"):
            load(folder)
        save_file(tensors | {key: tensors[key][..., 0].contiguous()}, folder / WEIGHTS, metadata)
        with pytest.raises(ValueError, match="is damaged"):
            load(folder)


def test_the_config_of_other_weights(folder):
    edit_config(folder, randlora_alpha=17)
    with pytest.raises(ValueError, match=r"randlora_alpha=17.*do not belong together"):
        load(folder)


def test_a_fifo(folder):
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)
    with pytest.raises(ValueError, match="is a FIFO"):
        load(folder)


def test_files_of_others_are_as_they_were(folder, tmp_path):
    """PEFT's files, and those of other methods, have no checksum of ours."""
    tensors, _ = tensors_of(folder)
    save_file({key: t.mul(2) if t.is_floating_point() else t for key, t in tensors.items()}, folder / WEIGHTS)
    load(folder)
    lora = peft.get_peft_model(net(), peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    assert torch.equal(load(tmp_path / "lora")(IDS), lora.eval()(IDS))
    lora.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert torch.equal(load(tmp_path / "bin")(IDS), lora.eval()(IDS))


def test_disabled_again():
    before = peft.utils.save_and_load.safe_load_file, peft.set_peft_model_state_dict
    with integration.enable():
        assert peft.utils.save_and_load.safe_load_file is not before[0]
        assert peft.peft_model.set_peft_model_state_dict is peft.set_peft_model_state_dict is not before[1]
    assert (peft.utils.save_and_load.safe_load_file, peft.set_peft_model_state_dict) == before


# ---- compiled models -------------------------------------------------------------------------------------------------


def compiled(model):
    return torch.compile(model, backend="eager")


def with_compiled_block():
    model = net()
    model.layers[0] = compiled(model.layers[0])
    return model


def with_compiled_head():
    model = net()
    model.head = compiled(model.head)
    return model


WAYS = {
    "plain": net,
    "whole": lambda: compiled(net()),
    "block": with_compiled_block,
    "head": with_compiled_head,
}


@pytest.mark.parametrize("saved", [None, ["head"]], ids=["", "modules_to_save"])
@pytest.mark.parametrize("read", WAYS)
@pytest.mark.parametrize("write", WAYS)
def test_compiled_bases(tmp_path, write, read, saved):
    """In either direction; what does not fit is PEFT's warning that keys are missing, as always."""
    with integration.enable(), contextlib.closing(_Reset()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(WAYS[write](), config("q_proj", "up_proj", modules_to_save=saved))
        randomize(model).save_pretrained(tmp_path)
        expected = model.eval()(IDS)
        warnings.filterwarnings("error", message="Found missing adapter keys.*lambda")
        found = peft.PeftModel.from_pretrained(WAYS[read](), tmp_path)
        torch.testing.assert_close(found(IDS), expected)
        state = peft.get_peft_model_state_dict(model)
        other = peft.get_peft_model(WAYS[read](), config("q_proj", "up_proj", modules_to_save=saved))
        peft.set_peft_model_state_dict(other, state)
        torch.testing.assert_close(other.eval()(IDS), expected)
        if any("_orig_mod" in key for key in state):
            key = next(key for key in state if "_orig_mod" in key)
            with pytest.raises(ValueError, match="twice"):
                peft.set_peft_model_state_dict(other, state | {key.replace("._orig_mod", ""): state[key]})
    assert json.loads((tmp_path / CONFIG).read_text())["peft_type"] == "RANDLORA"


class _Reset:
    def close(self):
        torch.compiler.reset()
