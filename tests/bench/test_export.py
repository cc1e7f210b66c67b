"""bench/export.py: every provider's singular values are checked, and wrong ones are noticed."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "transformers", "matplotlib", "tqdm"):
    pytest.importorskip(package)
if not hasattr(pytest.importorskip("peft"), "save_as_lora"):
    pytest.skip("this PEFT has no save_as_lora", allow_module_level=True)

from bench import export, records  # noqa: E402


def test_export(tmp_path, capsys):
    arguments = ["--quick", "--seconds", "0.01", "--dim", "80", "--rank", "32", "--no-picture", "--cpu-time"]
    assert export.main([*arguments, "--results", str(tmp_path)]) == 0
    (merged,) = tmp_path.glob("*/export-merged.csv")
    found = records.read(merged)
    assert len(found) == 3 and all(not row["failed"] and float(row["relative_error"]) < 1e-5 for row in found)
    (path,) = tmp_path.glob("*/export.csv")
    rows = records.read(path)
    assert len(rows) == 5 and {row["time"] for row in rows} == {"cpu"}
    for row in rows:
        assert not row["failed"] and float(row["relative_error"]) < 1e-5 and float(row["median_ms"]) > 0, row[
            "provider"
        ]


def test_wrong_singular_values_are_noticed():
    case = export.Case(40, 8, 4, "cpu")
    provider = case.of_randlora()
    folder = provider.call()
    assert provider.check(folder) < 1e-5
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.0.lora_A.weight"][2] *= 1.001
    save_file({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}, path)
    with pytest.raises(AssertionError, match="singular values differ"):
        provider.check(folder)


def test_wrong_merged_weights_are_noticed():
    case = export.Merged(40, 8, "cpu")
    for provider in (case.of_peft(), case.of_randlora()):
        weight = provider.call()
        assert provider.check(weight) < 1e-5
        update = weight - case.weight
        assert 0.2 < update.norm() / case.weight.norm() < 5  # one that is wrong would show
        with pytest.raises(AssertionError, match="merged weights differ"):
            provider.check(case.weight + 0.9 * update)
    torch.testing.assert_close(provider.call(), weight)  # nothing is merged for good


def test_ways_are_chosen(tmp_path):
    arguments = ["--quick", "--seconds", "0", "--dim", "80", "--rank", "32", "--no-picture", "--results", str(tmp_path)]
    assert export.main([*arguments, "--methods", "randlora to_lora, hadamard", "--only", "to LoRA"]) == 0
    (path,) = tmp_path.glob("*/export.csv")
    assert [row["provider"] for row in records.read(path)] == ["randlora to_lora, hadamard"]
