"""What is trained beside an adapter: biases, modules to save, heads of tasks; and what is not."""

import pytest
import torch
from helpers.models import (
    IDS,
    adapt,
    add,
    assert_computes,
    assert_only_layers_look_like_layers,
    layers_of,
    merged_by_hand,
    net,
    tiny_bert,
)
from torch import nn
from torch.testing import assert_close

# ---- trained beside the adapter ----


@pytest.mark.parametrize("bias", ["none", "all", "randlora_only"])
def test_bias(bias):
    model = adapt(net(), target_modules=["q_proj", "v_proj"], bias=bias)
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad and "randlora_" not in name}
    biases = {name for name, _ in model.model.named_parameters() if name.endswith("bias")}
    own = {f"layers.{i}.q_proj.base_layer.bias" for i in (0, 1)}  # v_proj has none
    assert trained == {"none": set(), "all": biases, "randlora_only": own}[bias] and len(biases) == 7
    with model.disable_adapter():
        pass
    assert {n for n, p in model.model.named_parameters() if p.requires_grad and "randlora_" not in n} == trained


def test_modules_to_save():
    plain = net()
    model = adapt(plain, modules_to_save=["head"])
    assert {n for n, p in model.named_parameters() if p.requires_grad and "randlora" not in n} == {
        "model.head.modules_to_save.default.weight",
        "model.head.modules_to_save.default.bias",
    }
    assert_computes(model, ["default"])
    with torch.no_grad():
        model.model.head.modules_to_save["default"].weight.mul_(2)
    changed = merged_by_hand(net(), model, ["default"])
    with torch.no_grad():
        changed.head.weight.mul_(2)
    assert_close(model(IDS), changed(IDS))
    with model.disable_adapter():
        assert torch.equal(model(IDS), net()(IDS))
    assert model.model.head.out_features == 7
    assert_close(model.merge_and_unload()(IDS), changed(IDS))
    assert type(plain.head) is nn.Linear


def test_modules_to_save_that_are_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(input=self.lin(x))

    model = adapt(Named(), target_modules=["lin"], modules_to_save=["norm"])
    model(torch.ones(2, 4)).sum().backward()
    assert model.model.norm.modules_to_save["default"].bias.grad is not None
    with torch.no_grad():
        model.model.norm.modules_to_save["default"].bias.add_(1)
        x = torch.randn(2, 4)
        mixed = model(x, adapter_names=["default", "__base__"])
        own = model(x)
        with model.disable_adapter():
            assert_close(mixed, torch.stack([own[0], model(x)[1]]))


HEADS = [
    ("SEQ_CLS", "BertForSequenceClassification", "classifier"),
    ("TOKEN_CLS", "BertForTokenClassification", "classifier"),
    ("QUESTION_ANS", "BertForQuestionAnswering", "qa_outputs"),
    ("FEATURE_EXTRACTION", "BertModel", None),
]


@pytest.mark.parametrize(("task", "cls", "head"), HEADS, ids=[case[0] for case in HEADS])
def test_task_type_trains_the_head(task, cls, head):
    model = adapt(tiny_bert(cls), target_modules=["query"], task_type=task)
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad and "randlora_" not in name}
    assert trained == ({f"{head}.modules_to_save.default.{p}" for p in ("weight", "bias")} if head else set())
    assert model.peft_config["default"].modules_to_save == ([head] if head else None)


def test_inference_mode():
    model = adapt(net(), inference_mode=True, modules_to_save=["head"])
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        pass
    model.disable_adapter_layers()
    model.enable_adapter_layers()
    assert not any(p.requires_grad for p in model.parameters())
    model.set_adapter("default")
    assert sum(p.requires_grad for p in model.parameters()) == 2 * len(layers_of(model)) + 2


def test_what_looks_like_a_layer_is_one():
    """Scripts, PEFT's among them, know an adapted layer by the attributes that it has."""
    model = adapt(net(), modules_to_save=["head"])
    updates = [m.get_delta_weight("default") for m in model.modules() if hasattr(m, "randlora_lambda")]
    assert len(updates) == len(layers_of(model)) == 8
    assert_only_layers_look_like_layers(model)
    with torch.no_grad():
        model(IDS, adapter_names=["default", "__base__"] * 2)
    assert_only_layers_look_like_layers(model)


def test_an_attention_does_not_look_like_a_layer():
    model = adapt(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 3)), target_modules=["0"])
    assert_only_layers_look_like_layers(model)
    assert [name.rpartition(".")[2] for name in layers_of(model)] == ["q_proj", "k_proj", "v_proj", "out_proj"]


def test_an_attribute_of_a_saved_module_that_is_called_module():
    """Whatever a module to save has, a mixed batch asks nothing of it but its outputs."""

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(13, 13)])

    model = net()
    model.router = Router()
    model.head.__dict__["module"] = model.router.experts[0]
    model = add(adapt(model, modules_to_save=["head"]), "bare", seed=2)
    own = model(IDS)
    model.set_adapter("bare")  # which runs the head as it was, whose attributes those of its wrapper are then
    with torch.no_grad():
        assert_close(model(IDS, adapter_names=["default"] * 4), own)
