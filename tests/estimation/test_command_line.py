"""Estimates as text, and on the command line."""

import json
from pathlib import Path

import pytest
import torch
from helpers.common import run_python
from helpers.estimates import TOKENS, config
from helpers.models import IDS, net, tiny_llama

from randlora import RandLoraConfig, estimate
from randlora.__main__ import main


def test_the_table_is_aligned_and_tells_the_numbers():
    result = estimate(net(torch.float32), config(), TOKENS, inputs=IDS)
    lines = str(result).splitlines()
    rule = next(i for i, line in enumerate(lines) if set(line) == {"-"})
    head, rows = lines[rule - 1], lines[rule + 1 : rule + 10]
    assert head.split()[-7:-3] == ["hadamard", "sparse", "very_sparse", "sign"] and all(
        len(r) == len(head) for r in rows
    )
    operations = next(r for r in rows if "multiply-adds" in r).split()[-6:]
    for got, method in zip(operations, result["methods"].values(), strict=True):
        assert float(got) == pytest.approx(method["multiply_adds"] / 1e9, abs=0.0005)
    assert json.loads(json.dumps(result)) == result


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("transformers")
    tiny_llama().config.save_pretrained(tmp_path)
    return str(tmp_path)


def test_command_line_tells_what_the_function_does(folder, capsys):
    arguments = ["estimate", "--model", folder, "--rank", "4", "--target-modules", "q_proj,v_proj", "--tokens", "20",
                 "--dtype", "bfloat16", "--device", "cpu"]  # fmt: skip
    expected = estimate(
        tiny_llama().bfloat16(), RandLoraConfig(r=4, target_modules=["q_proj", "v_proj"]), 20, device="cpu"
    )
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == expected and expected["inputs"] == "counted"
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{folder}\n{expected}\n"
    assert main([*arguments, "--kind", "very_sparse", "--sparsity", "5", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["methods"]) == ["very_sparse", "lora"]


@pytest.mark.parametrize("changes, match", [
    ({"--target-modules": "q_prj"}, "did you mean 'q_proj'"),
    ({"--tokens": "0"}, "--tokens must be at least 1"),
    ({"--rank": "0"}, "r must be at least 1"),
    ({"--sparsity": "5"}, "--sparsity is that of one kind"),
    ({"--model": "nobody/nothing"}, "the hub could not give it"),
    ({"--model": "empty"}, "has no config.json"),
], ids=str)  # fmt: skip
def test_command_line_errors_are_one_line(folder, changes, match, capsys, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (Path(folder) / "empty").mkdir()
    monkeypatch.chdir(folder)
    values = {"--model": folder, "--target-modules": "q_proj", "--tokens": "20"} | changes
    assert main(["estimate", *(part for pair in values.items() for part in pair)]) == 2
    shown = capsys.readouterr()
    assert match in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_without_a_command_there_is_help(capsys, tmp_path):
    assert main([]) == 0
    assert "estimate" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["estimate", "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and "--target-modules" in shown and "--json" in shown
    code = "import json, subprocess, sys; p = subprocess.run([sys.executable, '-m', 'randlora'], capture_output=True)"
    found = run_python(f"{code}; print(json.dumps([p.returncode, p.stdout.decode()]))", tmp_path)
    assert found[0] == 0 and found[1].startswith("usage: python -m randlora")
