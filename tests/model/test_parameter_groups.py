"""``parameter_groups``: every trained parameter in one group, with the learning rate of its group."""

import copy

import pytest
import torch
from helpers.common import make_base
from helpers.models import IDS, Net, adapt, add, layers_of, net
from torch import nn

import randlora
from randlora import parameter_groups


def check(model, groups, **expected):
    """`expected`: name of a group -> its number of parameters. All that is trained is in one of them."""
    assert {group["name"]: len(group["params"]) for group in groups} == expected
    given = [id(p) for group in groups for p in group["params"]]
    assert len(set(given)) == len(given)
    assert set(given) == {id(p) for p in model.parameters() if p.requires_grad}
    return torch.optim.AdamW(groups)


def rates(groups):
    return {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}


def test_a_model_with_all_that_can_be_trained():
    model = adapt(net(), target_modules=["q_proj", "up_proj"], modules_to_save=["head"], bias="randlora_only")
    add(model, "second", 2, target_modules=["q_proj"])
    groups = parameter_groups(model, lr=0.5, gamma_lr_ratio=4, weight_decay=0.25)
    optimizer = check(model, groups, **{"lambda": 4, "gamma": 4, "other": 2 + 4})
    assert rates(groups) == {"lambda": (0.5, 0.25), "gamma": (2.0, 0.0), "other": (0.5, 0.25)}
    assert rates(parameter_groups(model, 0.5))["gamma"] == (0.5 * randlora.layers.initial.GAMMA_LR_RATIO, 0.0)
    for name, held in (("lambda", "randlora_lambda"), ("gamma", "randlora_gamma")):
        (of_group,) = (group["params"] for group in groups if group["name"] == name)
        assert all(p is getattr(q, held)["default"] for p, q in zip(of_group, layers_of(model).values(), strict=True))

    before = copy.deepcopy(model.state_dict())
    model(IDS).square().mean().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert changed == trained and any(name.endswith("randlora_gamma.default") for name in changed)
    state = optimizer.state_dict()
    assert [group["name"] for group in state["param_groups"]] == ["lambda", "gamma", "other"]
    torch.optim.AdamW(parameter_groups(model, lr=0.1)).load_state_dict(state)


def test_one_adapter_of_several():
    model = adapt(net(), target_modules=["q_proj", "up_proj"], modules_to_save=["head"])
    add(model, "second", 2, target_modules=["q_proj"])
    model.set_adapter(["default", "second"])
    check(model, parameter_groups(model, 1.0), **{"lambda": 6, "gamma": 6, "other": 2})
    second = parameter_groups(model, 1.0, adapter_name="second")
    assert {group["name"]: len(group["params"]) for group in second} == {"lambda": 2, "gamma": 2}
    assert all(p is layer.randlora_lambda["second"]
               for p, layer in zip(second[0]["params"], layers_of(model, "second").values(), strict=True))  # fmt: skip
    model.set_adapter("default")
    with pytest.raises(ValueError, match=r"adapter 'second' is not trained: call set_adapter"):
        parameter_groups(model, 1.0, adapter_name="second")
    for layer in layers_of(model).values():
        layer.randlora_gamma["default"].requires_grad_(False)
    check(model, parameter_groups(model, 1.0), **{"lambda": 4, "other": 2})


def test_bare_layers_and_shared_ones():
    shared, head = randlora.Linear(make_base(9, 9), r=2), nn.Linear(9, 3)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.Tanh()), "head": head})
    model["tied"] = nn.Linear(9, 3)
    model["tied"].weight = head.weight
    check(model, parameter_groups(model, 1e-3), **{"lambda": 1, "gamma": 1, "other": 3})
    check(shared, parameter_groups(shared, 1e-3), **{"lambda": 1, "gamma": 1})
    attention = randlora.MultiheadAttention(nn.MultiheadAttention(8, 2), r=2)
    groups = parameter_groups(attention, 1e-3)
    assert [(group["name"], len(group["params"])) for group in groups][:2] == [("lambda", 4), ("gamma", 4)]
    check(attention, groups, **{group["name"]: len(group["params"]) for group in groups})


def test_experts():
    cases = pytest.importorskip("helpers.experts_cases")
    experts = randlora.Experts(cases.own(), r=3)
    check(experts, parameter_groups(experts, 1e-3), **{"lambda": 2, "gamma": 2})


@pytest.mark.parametrize("enabled", [True, False])
def test_a_model_of_pefts(enabled):
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft as integration

    config = peft.RandLoraConfig(r=2, target_modules=["q_proj", "up_proj"], modules_to_save=["head"])
    if enabled:
        with integration.enable():
            model = peft.get_peft_model(net(torch.float32), config)
    else:
        model = peft.get_peft_model(net(torch.float32), config)
    check(model, parameter_groups(model, 1e-3), **{"lambda": 4, "gamma": 4, "other": 2})


def test_trainer(tmp_path):
    trainers = pytest.importorskip("helpers.trainers")
    pytest.importorskip("transformers")
    model = trainers.our_model()
    groups = parameter_groups(model, lr=0.02, gamma_lr_ratio=0.5)

    def cls(**arguments):
        from randlora.integrations.transformers import Trainer

        return Trainer(**arguments, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups}))

    trainer = trainers.make_trainer(model, tmp_path, cls, max_steps=2, lr_scheduler_type="constant")
    trainer.train()
    assert [(g["name"], g["lr"], len(g["params"])) for g in trainer.optimizer.param_groups] == [
        ("lambda", 0.02, 8), ("gamma", 0.01, 8), ("other", 0.02, 1)
    ]  # fmt: skip
    assert all(p in trainer.optimizer.state or p.grad is None for g in groups for p in g["params"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": [1]}, TypeError, "model must be a torch.nn.Module, got list"),
        ({"model": nn.Linear(2, 2)}, ValueError, "this Linear has no adapters of RandLoRA"),
        ({"lr": "1e-3"}, TypeError, "lr must be a number, got '1e-3'"),
        ({"lr": -1.0}, ValueError, "lr must be at least 0"),
        ({"lr": float("nan")}, ValueError, "lr must be"),
        ({"gamma_lr_ratio": -1}, ValueError, "gamma_lr_ratio must be at least 0"),
        ({"gamma_lr_ratio": None}, TypeError, "gamma_lr_ratio must be a number"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be"),
        ({"adapter_name": "other"}, ValueError, "no adapter named 'other'; it has: default"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        parameter_groups(**({"model": adapt(net()), "lr": 1e-3} | change))


def test_parameters_without_numbers():
    with torch.device("meta"):
        model = randlora.get_peft_model(Net(), randlora.RandLoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"q_proj.randlora_lambda.default is on the meta device"):
        parameter_groups(model, 1e-3)
    model.to_empty(device="cpu")
    check(model, parameter_groups(model, 1e-3), **{"lambda": 2, "gamma": 2})
    model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"adapter 'default' is not trained"):
        parameter_groups(model, 1e-3)
