"""Folders that PEFT wrote with RandLoRA, as LoRA in PEFT: the outputs are those of the file's sample."""

import copy
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from randlora.export import to_lora

pytest.importorskip("transformers", reason="the models have a Conv1D")
peft = pytest.importorskip("peft")

DATA = Path(__file__).resolve().parents[1] / "data"
_spec = importlib.util.spec_from_file_location("make_peft_adapters", DATA / "make_peft_adapters.py")
made = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(made)


@pytest.mark.parametrize("case", sorted(made.CASES))
def test_peft_folder(case, tmp_path):
    if case in ("dense_drawn", "one_way_drawn"):
        pytest.skip("dense bases that are not in the file depend on PyTorch's version (docs/peft.md)")
    folder, base = DATA / "peft_adapters" / "0.21.2" / case, made.make_model(case)
    sample = load_file(folder / "sample.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = to_lora(folder, tmp_path / "lora", base_model=copy.deepcopy(base))
        model = peft.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
    assert result["exact"]
    with torch.no_grad():
        got, expected = model(sample["input"]), sample["output"]
    tolerance = 1e-5 if got.dtype == torch.float32 else 0.03
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance * expected.abs().max().item())
