"""Export as LoRA: what is refused, with nothing written."""

import pytest
import torch
from helpers.models import adapt, layers_of, net
from torch import nn

import randlora
from randlora.export import lora, to_lora

BOTH = ("layers.0.up_proj", "layers.1.down_proj")  # in < out and in > out


def tied():
    model = net()
    model.layers[1].q_proj = model.layers[0].q_proj
    return adapt(model)


def attention():
    return adapt(nn.Sequential(nn.MultiheadAttention(12, 2)), target_modules=["0"])


def not_finite(what):
    model = adapt(net())
    with torch.no_grad():
        layers_of(model)[BOTH[1]].get_parameter(f"randlora_{what}.default")[0, 0] = float("nan")
    return model


REFUSED = {
    "rank 0": (lambda: adapt(net()), {"rank": 0}, "rank must be at least 1"),
    "rank": (lambda: adapt(net()), {"rank": 10**9}, "rank must be at most 65536"),
    "a float": (lambda: adapt(net()), {"rank": 2.0}, "rank must be an integer"),
    "both": (lambda: adapt(net()), {"rank": 2, "energy": 0.9}, "rank or energy, not both"),
    "no energy": (lambda: adapt(net()), {"energy": 0.0}, "energy must be above 0 and at most 1"),
    "much energy": (lambda: adapt(net()), {"energy": 99}, "energy must be above 0 and at most 1"),
    "dtype": (lambda: adapt(net()), {"dtype": torch.int8}, "dtype must be one of"),
    "no dtype": (lambda: adapt(net()), {"dtype": "float32"}, "dtype must be one of"),
    "per_layer": (lambda: adapt(net()), {"per_layer": 3}, "per_layer must be True or False"),
    "no model": (net, {}, "model_or_folder must be a randlora.RandLoraModel, a model"),
    "base_model": (lambda: adapt(net()), {"base_model": net()}, "base_model is for the folder"),
    "tied": (tied, {}, "is one layer with layers.1.q_proj.*merge"),
    "attention": (attention, {}, "MultiheadAttention.*merge"),
    "nan": (lambda: not_finite("lambda"), {}, r"randlora_lambda.*NaN"),
    "nan in gamma": (lambda: not_finite("gamma"), {"rank": 2}, r"randlora_gamma.*NaN"),
    "no numbers": (lambda: adapt(net().to("meta")), {"rank": 2}, "meta device"),
    "no folder": (lambda: "no/such/folder/here", {}, "there is no such folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case, tmp_path):
    make, asked, match = REFUSED[case]
    with pytest.raises((TypeError, ValueError), match=f"(?s){match}"):
        to_lora(make(), tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())


def test_experts_are_refused(tmp_path):
    from helpers.experts_cases import tiny

    model = tiny("Mixtral")
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = randlora.RandLoraConfig(r=4, target_modules=[], target_parameters=targets)
    with pytest.raises(ValueError, match=r"fused experts.*merge"):
        to_lora(randlora.get_peft_model(model, config), tmp_path / "out", rank=2)
    assert not list(tmp_path.iterdir())


def test_full_rank_wants_to_be_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "SERVED", 12)
    with pytest.raises(ValueError, match=r"rank up to 13 \('layers.0.q_proj'\).*rank=13 is exact"):
        to_lora(adapt(net()), tmp_path / "out")
    assert to_lora(adapt(net()), tmp_path / "out", rank=13)["exact"]


def test_output_folder(tmp_path, monkeypatch):
    model = adapt(net(), num_bases=1)
    (tmp_path / "file").write_text("kept")
    for output in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=r"is a file|holds 'file' already"):
            to_lora(model, output)
    assert (tmp_path / "file").read_text() == "kept" and len(list(tmp_path.iterdir())) == 1
    to_lora(model, tmp_path / "new" / "folder")
    with pytest.raises(ValueError, match="already"):
        to_lora(model, tmp_path / "new" / "folder")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("randlora.export.lora_folder.write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        to_lora(model, tmp_path / "other" / "folder")
    assert not (tmp_path / "other").exists()
