"""randlora.estimate of fused experts against what the adapted models take."""

import copy
import json

import pytest
import torch
from helpers.counted import SavedBytes, multiply_adds
from helpers.experts_cases import EVEN, FAMILIES, HIDDEN, E, families, tiny
from helpers.memory import peak
from helpers.models import IDS
from torch.utils._python_dispatch import TorchDispatchMode

import randlora
from randlora.__main__ import main
from randlora.layers import experts_choice

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


# ---- all experts at once, as on a GPU ----


class Products(TorchDispatchMode):
    """Multiply-adds of all products, of one matrix and of groups."""

    multiply_adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name in ("mm", "addmm_", "_grouped_mm"):
            a, b = args[1:3] if name == "addmm_" else args[:2]
            # Of two matrices in groups the tokens are what is summed over.
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[-1]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(experts_choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(experts_choice, "DTYPES", (torch.float32,))
    monkeypatch.setattr(experts_choice, "HOST", (10**18, 10**18))


@pytest.mark.parametrize("kind", ["dense", "hadamard"])
@families
def test_what_is_computed_at_once(at_once, family, kind):
    """Operations are those that run. Temporaries are estimated without the smallest ones."""
    settings = SETTINGS | {"r": 8, "kind": kind}
    told = randlora.estimate(made(family), settings, IDS.numel())["methods"][kind]
    assert {row["forward"] for row in told["shapes"]} == {"grouped"}
    model = randlora.get_peft_model(made(family), settings)
    top_k = FAMILIES[family]["num_experts_per_tok"]
    rows, measured, temporaries = IDS.numel() * top_k, 0, []
    ids = torch.arange(rows).reshape(-1, top_k) % E
    inner = model.model.model.layers[0].mlp.experts.adapted()[1].in_features
    for layer, trained_before in zip(model.model.model.layers, (False, True), strict=True):
        experts = layer.mlp.experts
        hidden = torch.randn(IDS.numel(), HIDDEN, requires_grad=trained_before)
        with Products() as products:
            experts(hidden, ids, torch.rand(ids.shape)).sum().backward()
        # Of the frozen weights, forward, and backward for the input.
        measured += products.multiply_adds - rows * HIDDEN * inner * (2 * (1 + trained_before) + 2)
        for part in experts.adapted():
            temporaries.append(beside_results(part, rows))
    assert told["multiply_adds"] == measured
    assert told["workspace_bytes"] == pytest.approx(max(temporaries), rel=0.2)


def beside_results(part, rows):
    """Bytes at the peak of a step of one part, beside its inputs and the larger of its results."""
    x = torch.randn(rows, part.in_features, requires_grad=True)
    counts = [rows // E + (i < rows % E) for i in range(E)]
    y = part(x, counts, part.weight, None)
    grad, trained = torch.randn_like(y), [part.randlora_lambda["default"], part.randlora_gamma["default"]]
    wanted = [x, *trained]
    forward = peak(lambda: part(x, counts, part.weight, None)) - y.nbytes
    backward = peak(lambda: torch.autograd.grad(y, wanted, grad, retain_graph=True)) - sum(t.nbytes for t in wanted)
    return max(forward, backward)
