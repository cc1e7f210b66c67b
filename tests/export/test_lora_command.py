"""Saved adapters as LoRA: folders, their base models, and ``python -m randlora export --lora``."""

import copy
import json

import pytest
import torch
from helpers.models import IDS, adapt, add, assert_unchanged, net, snapshot, tiny_llama
from safetensors.torch import load_file

from randlora.__main__ import main
from randlora.export import to_lora


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


@pytest.fixture
def saved(tmp_path):
    """A base model and two adapters of it in folders, and the adapted model."""
    base = tmp_path / "base"
    tiny_llama().save_pretrained(base)
    plain = type(tiny_llama()).from_pretrained(base)
    model = adapt(plain, target_modules=["q_proj", "down_proj"], num_bases=2, modules_to_save=["lm_head"])
    add(model, "other", 3, target_modules=["v_proj"], num_bases=1, kind="hadamard")
    with torch.no_grad():
        model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model.eval()


def test_a_folder_gives_what_the_model_does(saved):
    folder, model = saved
    for name in ("default", "other"):
        for asked in ({}, {"rank": 2}, {"energy": 0.7, "per_layer": True}):
            out = folder / f"{name}{len(asked)}"
            expected = to_lora(model, out / "a", adapter=name, **asked)
            assert to_lora(folder / "adapter", out / "b", adapter=name, **asked) == expected
            assert files(out / "a") == files(out / "b")
    expected = to_lora(model, folder / "a", rank=2, inputs=IDS)
    found = to_lora(folder / "adapter", folder / "b", rank=2, inputs=IDS)
    assert found == expected and found["logits"]["largest_difference"] > 0


def test_the_base_model_may_be_given(saved):
    folder, model = saved
    base = type(tiny_llama()).from_pretrained(folder / "base")
    before = snapshot(base)
    expected = to_lora(model, folder / "a", inputs=IDS)
    for i, given in enumerate((base, folder / "base", str(folder / "base"))):
        assert to_lora(folder / "adapter", folder / f"b{i}", base_model=given, inputs=IDS) == expected
        assert files(folder / "a") == files(folder / f"b{i}")
        to_lora(folder / "adapter", folder / f"c{i}", base_model=given)
    assert_unchanged(base, before)
    with pytest.raises(ValueError, match="adapted already"):
        to_lora(folder / "adapter", folder / "d", base_model=model)
    with pytest.raises(ValueError, match="has no adapter 'third'"):
        to_lora(folder / "adapter", folder / "d", adapter="third")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        to_lora(folder / "adapter", folder / "d", base_model=folder / "adapter")


def test_models_of_no_library(tmp_path):
    """Of these the folder knows no name; biases, which lie in the base model, come from the folder."""
    for bias in ("none", "randlora_only", "all"):
        here = tmp_path / bias
        model = adapt(net(), bias=bias, num_bases=2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias") and parameter.requires_grad:
                    parameter.add_(1)
        model.save_pretrained(here / "adapter")
        with pytest.raises(ValueError, match="does not say which model"):
            to_lora(here / "adapter", here / "lora")
        assert not (here / "lora").exists()
        expected = to_lora(model, here / "a")
        base = net()
        before = snapshot(base)
        for i, given in enumerate((base, copy.deepcopy(base).to("meta"))):
            assert to_lora(here / "adapter", here / f"b{i}", base_model=given) == expected
            assert files(here / "a") == files(here / f"b{i}")
        assert_unchanged(base, before)


def run(*arguments):
    return main(["export", *map(str, arguments)])


def test_command(saved, capsys):
    folder, model = saved
    expected = to_lora(model, folder / "a", rank=3, dtype=torch.bfloat16)
    capsys.readouterr()
    arguments = [folder / "adapter", "--lora", "--rank", 3, "--dtype", "bfloat16"]
    assert run(*arguments, "--output", folder / "b", "--json") == 0
    assert json.loads(capsys.readouterr().out) == expected == json.loads(json.dumps(expected))
    assert files(folder / "a") == files(folder / "b")
    assert run(*arguments, "--output", folder / "c", "--model", folder / "base") == 0
    assert capsys.readouterr().out == f"{expected}\n\n{folder / 'c'} has the adapter of LoRA\n"
    table = str(expected).splitlines()
    head = next(line for line in table if line.startswith("layer"))
    rows = [line for line in table if "q_proj" in line or "down_proj" in line]
    assert len(rows) == 4 and all(len(row) == len(head) for row in rows) and rows[0].split()[4] == "3"
    assert any("vLLM" in line and "--max-lora-rank 8" in line for line in table)
    # another adapter, by energy, with outputs on random tokens
    arguments = [folder / "adapter", "--lora", "--adapter-name", "other", "--energy", 0.6, "--per-layer"]
    assert run(*arguments, "--output", folder / "d", "--inputs", "random", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    ids = torch.randint(0, 19, (1, 64), generator=torch.Generator().manual_seed(0))
    assert found.pop("logits")["largest_difference"] > 0 and ids.shape == (1, 64)
    expected = to_lora(model, folder / "e", energy=0.6, adapter="other", per_layer=True)
    assert found == expected and files(folder / "d") == files(folder / "e")
    assert load_file(folder / "d" / "adapter_model.safetensors").keys()


def test_inputs_of_a_text(saved, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    folder, model = saved
    (folder / "text").write_text("a few words", encoding="utf-8")
    arguments = [folder / "adapter", "--lora", "--rank", 2, "--inputs", folder / "text"]
    assert run(*arguments, "--output", folder / "no") == 2
    assert "--inputs random" in capsys.readouterr().err and not (folder / "no").exists()

    def tokenizer(text, return_tensors):
        assert text == "a few words" and return_tensors == "pt"
        return {"input_ids": IDS[:1]}

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    assert run(*arguments, "--output", folder / "b", "--json") == 0
    expected = to_lora(model, folder / "a", rank=2, inputs=IDS[:1])
    assert json.loads(capsys.readouterr().out) == expected
    assert run(*arguments, "--output", folder / "c") == 0
    assert f"outputs differ by {expected['logits']['largest_difference']:.3g} at most" in capsys.readouterr().out


@pytest.mark.parametrize("changes, match", [
    (["--rank", "0"], "rank must be at least 1"),
    (["--rank", "2", "--energy", "0.5"], "rank or energy, not both"),
    (["--model", "nowhere"], "no config for 'nowhere'"),
    (["--adapter-name", "third"], "has no adapter 'third'"),
    (["--inputs", "no-such-file"], "no-such-file"),
], ids=str)  # fmt: skip
def test_command_line_errors_are_one_line(saved, changes, match, capsys, monkeypatch):
    folder, _ = saved
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    assert run(folder / "adapter", "--lora", "--output", folder / "out", *changes) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1 and error.startswith("python -m randlora export: ")
    assert not (folder / "out").exists()


def test_command_says_what_it_needs(saved, capsys):
    folder, _ = saved
    with pytest.raises(SystemExit):
        run(folder / "adapter", "--output", folder / "out")
    assert "--lora --merged is required" in capsys.readouterr().err
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("kept")
    assert run(folder / "adapter", "--lora", "--output", folder / "out") == 2
    assert "holds 'mine' already" in capsys.readouterr().err
