"""Plans: what a config leaves to the model is filled in in a copy, and neither it nor the model is changed."""

import copy

import pytest
import torch
from helpers.models import IDS, assert_unchanged, layers_of, net, snapshot, tiny_bert
from torch import nn

import randlora
from randlora.config import RandLoraConfig
from randlora.model.adapter_plan import own_bases, plan_adapter
from randlora.model.targets import find_targets, named_targets

OPEN = {
    "very_sparse": {"kind": "very_sparse", "target_modules": ["query", "output.dense"]},
    "hadamard": {"kind": "hadamard", "target_modules": ["query", "output.dense"]},
    "head": {"task_type": "SEQ_CLS", "target_modules": ["query"]},
    "name": {"target_modules": ["query"]},
    "all": {"target_modules": "all-linear", "exclude_modules": ["classifier"]},
    "defaults": {},
}


@pytest.mark.parametrize("case", OPEN)
def test_a_config_stays_as_it_was(case):
    if case == "defaults":
        pytest.importorskip("peft")
    model, config = tiny_bert(), RandLoraConfig(r=4, **OPEN[case])
    model.name_or_path = "someone/bert"
    before, given = snapshot(model), copy.deepcopy(config)
    plan = plan_adapter(model, config)
    assert config == given and plan.config is not config
    filled = {
        "very_sparse": plan.config.sparsity is not None, "hadamard": plan.config.group_width is not None,
        "head": plan.config.modules_to_save == ["classifier"], "defaults": bool(plan.config.target_modules),
    }  # fmt: skip
    assert filled.get(case, True)
    # What finds the parts changes neither.
    named, found = copy.deepcopy(plan.config), copy.deepcopy(plan.config)
    named_targets(model, named)
    find_targets(model, found)
    assert named == plan.config == found
    if case in ("very_sparse", "hadamard"):
        resolved, bases = own_bases(config, plan.slots, plan.peft_dims)
        assert config == given and resolved.kind == config.kind and bases is plan.bases
        assert (resolved.sparsity, resolved.group_width) == (plan.config.sparsity, plan.config.group_width)
    assert_unchanged(model, before)

    adapted = randlora.get_peft_model(model, config)
    plan.config.base_model_name_or_path = "someone/bert"
    assert config == given and adapted.peft_config["default"] == plan.config


def test_one_config_for_two_models():
    """Nothing that one model has filled in reaches the other."""
    config = RandLoraConfig(r=4, kind="very_sparse", target_modules=["0"])
    sizes = (16, 25)
    models = [randlora.get_peft_model(nn.Sequential(nn.Linear(size, 40)), config) for size in sizes]
    assert [model.peft_config["default"].sparsity for model in models] == [4.0, 5.0] and config.sparsity is None


def test_a_plan_comes_in_through_its_own_door():
    plain = net()
    plan = plan_adapter(plain, RandLoraConfig(r=4, target_modules=["q_proj"], inference_mode=True))
    before = snapshot(plain)
    with pytest.raises(TypeError, match=r"config must be a randlora\.RandLoraConfig, PEFT's, or a dict, got Plan"):
        randlora.RandLoraModel(plain, plan)
    assert_unchanged(plain, before)

    model = randlora.RandLoraModel.from_plan(plain, plan, "planned")
    assert type(model).__name__ == "RandLoraModel[Net]" and isinstance(model, randlora.RandLoraModel)
    assert model.peft_config == {"planned": plan.config} and model.active_adapters == ["planned"]
    assert list(layers_of(model)) == list(plan.targets) and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(model(IDS), net()(IDS))
    for again in (plain, model):
        with pytest.raises(ValueError, match="adapted already: add another adapter with add_adapter"):
            randlora.RandLoraModel.from_plan(again, plan)


def test_other_bases_must_be_large_enough():
    plan = plan_adapter(net(), RandLoraConfig(r=4, target_modules=["q_proj"]))
    own = plan.on_own_bases()
    assert own.bases is plan.bases and own.config == plan.config
    large, small = (randlora.RandomBases.from_tensors(torch.ones(4, 1, n), torch.ones(n, 4, 4)) for n in (13, 12))
    assert plan.on(large).bases is large
    with pytest.raises(ValueError, match="12"):
        plan.on(small)


class Mine(randlora.RandLoraModel):
    """A user's subclass, whose constructor is its own."""

    def __init__(self, model, config):
        super().__init__(model, config, "mine")
        self.extra = 1


def test_classes_derived_from_ours():
    model = Mine(net(), {"target_modules": ["q_proj"], "r": 4})
    twin = copy.deepcopy(model)
    for made in (model, twin):
        assert type(made).__mro__[1] is Mine and made.active_adapter == "mine" and made.extra == 1
        assert torch.equal(made(IDS), net()(IDS))
