"""randlora.estimate of fused experts against what the adapted models take."""

import copy
import json

import pytest
import torch
from helpers.counted import SavedBytes, multiply_adds
from helpers.experts_cases import EVEN, FAMILIES, HIDDEN, E, families, tiny
from helpers.models import IDS

import randlora
from randlora.__main__ import main

SETTINGS = {"r": 4, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def made(family):
    return tiny(family, torch.float32, "grouped_mm", **EVEN[family])


@families
def test_an_estimate_is_what_the_adapted_model_takes(family, tmp_path):
    plain = made(family)
    result = randlora.estimate(plain, SETTINGS | {"kind": "hadamard"}, IDS.numel())
    told = result["methods"]["hadamard"]
    assert result["inputs"] == "counted" and result["layers"] == 4
    model = randlora.get_peft_model(copy.deepcopy(plain), SETTINGS | {"kind": "hadamard"})
    assert told["trainable_parameters"] == model.get_nb_trainable_parameters()[0]
    model.save_pretrained(tmp_path)
    assert told["file_bytes"] == pytest.approx(
        sum(path.stat().st_size for path in tmp_path.glob("adapter_*")), rel=0.03
    )
    assert told["file_bytes"] == told["file_bytes_without_projections"]  # PEFT cannot read it in any case

    top_k = FAMILIES[family]["num_experts_per_tok"]
    inner = plain.model.layers[0].mlp.experts.down_proj.shape[1 if family == "GptOss" else 2]
    assert told["saved_bytes"] == 2 * 4 * IDS.numel() * top_k * (HIDDEN + inner)
    calls = sum(row["count"] for row in told["shapes"])
    assert calls == 2 * 2 * E  # every expert of four parameters has tokens


def test_operations_are_those_of_the_products_that_run():
    """Of two blocks; before the experts of the first nothing is trained. All experts get equally many tokens."""
    model = made("Mixtral")
    told = randlora.estimate(model, SETTINGS | {"strategy": "materialized"}, IDS.numel())["methods"]["dense"]
    adapted = randlora.get_peft_model(model, SETTINGS | {"strategy": "materialized"})
    rows, measured = IDS.numel() * 2, 0
    ids = torch.arange(rows).reshape(-1, 2) % E
    for layer, trained_before in zip(adapted.model.model.layers, (False, True), strict=True):
        hidden = torch.randn(IDS.numel(), HIDDEN, requires_grad=trained_before)
        with torch.profiler.profile(record_shapes=True) as profile:
            layer.mlp.experts(hidden, ids, torch.rand(ids.shape)).sum().backward()
        frozen = rows * HIDDEN * (48 * (1 + trained_before) + 24 * 2)  # forward, and backward for the input
        measured += multiply_adds(profile) - frozen
    assert told["multiply_adds"] == measured


def test_the_number_of_experts_of_a_token_comes_from_the_config():
    model = made("Qwen3Moe")
    counted = randlora.estimate(model, SETTINGS, 20)
    unseen = randlora.estimate(model.model, SETTINGS, 20, inputs={"nothing": 0})
    assert unseen["inputs"] == "upper bound"
    assert unseen["methods"]["dense"]["saved_bytes"] == counted["methods"]["dense"]["saved_bytes"]


def test_lora_is_what_peft_makes_of_it():
    """A copy of all experts' weights: what docs/models.md compares with."""
    peft = pytest.importorskip("peft")
    plain = made("Mixtral")
    told = randlora.estimate(plain, SETTINGS, IDS.numel())["methods"]["lora"]
    config = peft.LoraConfig(
        r=told["rank"], target_modules=[], target_parameters=SETTINGS["target_parameters"], lora_dropout=0.0
    )
    with SavedBytes(plain.parameters()) as frozen:
        plain.requires_grad_(False).model(inputs_embeds=torch.zeros(1, 20, HIDDEN, requires_grad=True))
    model = peft.get_peft_model(plain, config)
    assert told["trainable_parameters"] == model.get_nb_trainable_parameters()[0]
    with SavedBytes(model.parameters()) as saved:
        model.base_model.model.model(inputs_embeds=torch.zeros(1, 20, HIDDEN, requires_grad=True))
    weights = 2 * E * 4 * (HIDDEN * 48 + HIDDEN * 24)
    assert told["saved_bytes"] == weights
    assert weights <= saved.bytes - frozen.bytes <= 1.5 * weights  # and copies of its factors


def test_the_command_line(tmp_path, capsys):
    plain = made("Mixtral")
    plain.config.save_pretrained(tmp_path)
    words = ["estimate", "--model", str(tmp_path), "--target-parameters", "experts.gate_up_proj,experts.down_proj"]
    assert main([*words, "--target-modules", "", "--tokens", "20", "--rank", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["methods"]
    assert told["dense"] == randlora.estimate(plain, SETTINGS, 20)["methods"]["dense"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_that_stay_as_they_are_do_not_keep_a_model_from_being_counted(dtype, caplog):
    """torch would not follow their products without numbers in every dtype, and says so in its log at length."""
    model = tiny("Qwen3Moe", dtype, "grouped_mm", **EVEN["Qwen3Moe"])
    result = randlora.estimate(model, {"r": 4, "target_modules": ["q_proj", "o_proj"]}, IDS.numel())
    assert result["inputs"] == "counted" and not caplog.records
    # The input of each q_proj: attention keeps its own output, which is o_proj's input.
    assert result["methods"]["hadamard"]["saved_bytes"] == 2 * IDS.numel() * HIDDEN * dtype.itemsize


def test_what_torch_cannot_follow_is_told_in_one_line_and_not_in_its_log(caplog):
    class Grouped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, x):
            return torch._grouped_mm(self.inner(x), self.inner.weight[None], offs=torch.tensor([5], dtype=torch.int32))

    model, settings = torch.nn.Sequential(Grouped()), {"r": 4, "target_modules": ["inner"]}
    result = randlora.estimate(model, settings, 5, inputs=torch.zeros(5, 8))
    assert result["inputs"] == "upper bound" and not caplog.records
    assert sum("no trial call" in note for note in result["notes"]) == 1
