"""Merged models in files: what is refused before anything is written, and the command."""

import copy
import json
import os
import shutil

import pytest
import torch
from helpers.merged_folders import assert_loads_as, left, merged_model, saved
from helpers.models import randomize, tiny_llama

from randlora.export import shards, to_merged

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


def test_links_and_sizes(tmp_path):
    """An output that links to another folder, there or not; and sizes of files as they are written."""
    _, adapter, _ = saved(tiny_llama(num_hidden_layers=1), tmp_path)
    (tmp_path / "there").mkdir()
    for i, (name, size, more) in enumerate(
        [("there", 20000, True), ("new", " 20 kb", True), ("other", "1.5GB", False)]
    ):
        link = tmp_path / f"link{i}"
        link.symlink_to(tmp_path / name)
        to_merged(adapter, link, max_shard_size=size)
        assert link.is_symlink() and (tmp_path / name / "config.json").is_file()
        assert (tmp_path / name / shards.INDEX).is_file() == more
        assert more or (tmp_path / name / "model.safetensors").is_file()
    assert left(tmp_path) == ["link0", "link1", "link2", "new", "other", "there"]


def test_refused(tmp_path, monkeypatch):
    base, adapter, model = saved(tiny_llama(), tmp_path)
    out = tmp_path / "out"

    def refuses(match, *args, error=ValueError, **settings):
        before = left(tmp_path)
        with pytest.raises(error, match=match):
            to_merged(*(args or (adapter, out)), **settings)
        assert left(tmp_path) == before

    refuses("holds 'config.json' already", adapter, base)
    refuses("is a file", adapter, base / "config.json")
    for dtype in (torch.int8, torch.float8_e4m3fn, "float16"):
        refuses("dtype must be one of", dtype=dtype)
    refuses("has no adapter 'c'", adapter, out, "c")
    refuses("at least one", adapter, out, [])
    refuses("has its own", model, out, base_model=base)
    refuses("must be a randlora.RandLoraModel or the folder", 3, out, error=TypeError)
    for size in (0, -1, "0KB", "-5GB", "5", "many", "", 1.5, None, True):
        refuses("max_shard_size must be", max_shard_size=size)
    refuses("no config", adapter, out, base_model=adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    refuses("make room", error=OSError)
    monkeypatch.undo()
    out.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(out))  # pathlib asks it since 3.12
    monkeypatch.setattr(type(out), "is_mount", lambda path: path == out)
    refuses("is where a disk is mounted")
    monkeypatch.undo()
    monkeypatch.chdir(out)
    refuses("is the current folder", adapter, ".")
    monkeypatch.undo()
    out.rmdir()
    with torch.no_grad():
        broken = copy.deepcopy(model)
        next(iter(broken.model.model.layers[0].mlp.down_proj.randlora_lambda.values())).fill_(1e30)
        next(iter(broken.model.model.layers[0].mlp.down_proj.randlora_gamma.values())).fill_(1e30)
    refuses("NaN", broken, out)
    large = randomize(copy.deepcopy(model))
    with torch.no_grad():
        for layer in large.model.model.layers:
            layer.mlp.down_proj.randlora_lambda["default"].mul_(1e7)
    large.save_pretrained(tmp_path / "large")
    refuses("down_proj.weight is not finite", tmp_path / "large", out, dtype=torch.float16)
    for path in ("norm", "layers.0.mlp.down_proj.base_layer"):  # of a tensor that is copied, and of one that is merged
        large = copy.deepcopy(model)
        with torch.no_grad():
            large.model.model.get_submodule(path).weight[:1].fill_(1e5)
        refuses("too large for torch.float16", large, out, dtype=torch.float16)
    large.model.generation_config.temperature = 0.5  # which says that it does not sample
    with monkeypatch.context() as patch:
        patch.setattr(shards.Shards, "write", None)
        refuses("GenerationConfig is invalid", large, out)
    files = safetensors.load_file(base / "model.safetensors")
    safetensors.save_file(files | {"beside": torch.tensor([1e5])}, base / "model.safetensors", {"format": "pt"})
    refuses("beside has numbers that are too large", dtype=torch.float16)
    safetensors.save_file(files, base / "model.safetensors", {"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    refuses("quantised weights")
    for text, match in (("{", "config.json cannot be read"), ("[]", "config.json holds no JSON object, but a list")):
        (base / "config.json").write_text(text)
        refuses(match)
    (base / "config.json").write_text(json.dumps(config))
    for text, match in (
        ("{", "index.json cannot be read"),
        ("{}", "no weight_map"),
        ('{"weight_map": []}', "no weight"),
    ):
        (base / shards.INDEX).write_text(text)
        refuses(match)
    (base / shards.INDEX).unlink()
    state = safetensors.load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    safetensors.save_file({k: t for k, t in state.items() if k != name}, base / "model.safetensors", {"format": "pt"})
    refuses(f"has no {name}")
    coarse = {k: t.to(torch.float8_e4m3fn) if k == name else t for k, t in state.items()}
    safetensors.save_file(coarse, base / "model.safetensors", {"format": "pt"})
    refuses(f"{name} is of torch.float8_e4m3fn")
    os.remove(base / "model.safetensors")
    refuses("has no model.safetensors, but pytorch_model.bin")


def test_the_command(tmp_path, capsys):
    from randlora.__main__ import main

    _, adapter, model = saved(tiny_llama(), tmp_path)
    out = tmp_path / "out"
    assert main(["export", str(adapter), "--merged", "--output", str(out), "--dtype", "bfloat16"]) == 0
    assert str(out) in capsys.readouterr().out
    assert_loads_as(out, merged_model(model).bfloat16())
    assert main(["export", str(adapter), "--merged", "--output", str(out)]) == 2
    assert "already" in capsys.readouterr().err
