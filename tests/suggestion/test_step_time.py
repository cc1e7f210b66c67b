"""How long a step is said to take, against steps that were measured (bench/results)."""

import csv
from pathlib import Path

import pytest
import torch

from randlora import RandLoraConfig
from randlora.estimation.count import count
from randlora.suggestion.step_time import relative_step

transformers = pytest.importorskip("transformers")
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
METHODS = {
    "randlora": "dense", "randlora hadamard": "hadamard", "randlora very_sparse": "very_sparse", "PEFT LoRA": "lora",
    "PEFT LoRA, 16-bit": "lora",
}  # fmt: skip
MODELS = {
    "MiniLM-L6": lambda depth: transformers.BertModel(transformers.BertConfig(
        hidden_size=384, num_hidden_layers=depth, num_attention_heads=12, intermediate_size=1536,
    )),
    "ViT-B/32": lambda depth: transformers.ViTModel(transformers.ViTConfig(patch_size=32, num_hidden_layers=depth)),
    "Llama-3.2-3B": lambda depth: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        hidden_size=3072, intermediate_size=8192, num_hidden_layers=depth, num_attention_heads=24,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True,
    )),
}  # fmt: skip


@pytest.mark.parametrize("folder, model, tokens", [
    ("amd-epyc-avx512-2-cores", "MiniLM-L6", "128"),
    ("amd-epyc-avx2-2-cores", "ViT-B/32", "50"), ("nvidia-h200", "Llama-3.2-3B", "1024"),
])  # fmt: skip
def test_steps_take_about_as_long_as_measured(folder, model, tokens):
    if not RESULTS.exists():
        pytest.skip("the measurements are in the repository alone")
    with open(RESULTS / folder / "model.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["model"] == model and row["tokens"] == tokens]
    frozen = next(float(row["median_ms"]) for row in rows if row["provider"] == "frozen")
    row = rows[0]
    r, depth, T = int(row["r"]), int(row["depth"].split("/")[0]), int(row["batch"]) * int(tokens)
    with torch.device("meta"):
        plain = MODELS[model](depth).to(getattr(torch, row["dtype"]))
    targets = "all-linear" if row["targets"] == "all-linear" else row["targets"].split()
    counted = count(plain, RandLoraConfig(r=r, target_modules=targets), T, device=row["device"], calls={})
    measured = {
        METHODS[row["provider"]]: float(row["median_ms"]) / frozen for row in rows if row["provider"] in METHODS
    }
    assert len(measured) >= 3
    for method, ratio in measured.items():
        values = counted.lora(r) if method == "lora" else counted.randlora(method)
        said = relative_step(plain, counted, method, values["multiply_adds"])
        assert said == pytest.approx(ratio, rel=0.05), method
