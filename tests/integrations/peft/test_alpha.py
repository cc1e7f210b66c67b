"""``randlora_alpha="auto"`` in PEFT's config while randlora is enabled: what randlora's own models get."""

import copy
import json
import pickle

import pytest
import torch
from helpers.models import IDS, net
from torch import nn

import randlora

peft = pytest.importorskip("peft")
import randlora.integrations.peft as integration  # noqa: E402

SETTINGS = {"r": 4, "target_modules": ["q_proj", "up_proj", "down_proj"]}


@pytest.fixture(autouse=True)
def enabled():
    with integration.enable():
        yield


def auto(**settings):
    return peft.RandLoraConfig(**SETTINGS | {"randlora_alpha": "auto"} | settings)


def test_alpha_and_gamma_are_those_of_our_models(tmp_path):
    config = auto()
    model = peft.get_peft_model(net(torch.float32), config)
    ours = randlora.get_peft_model(net(torch.float32), randlora.RandLoraConfig(**SETTINGS, randlora_alpha="auto"))
    alpha = ours.peft_config["default"].randlora_alpha
    assert config.randlora_alpha == model.peft_config["default"].randlora_alpha == alpha
    for (name, p), (other, q) in zip(model.named_parameters(), ours.named_parameters(), strict=True):
        assert torch.equal(p, q), (name, other)
    model.add_adapter("second", auto(r=3, target_modules=["up_proj"]))
    model.add_adapter("random", auto(init_weights=False))
    layer = model.base_model.model.layers[0].up_proj
    assert layer.scaling["random"] == layer.scaling["default"] != layer.scaling["second"]
    assert layer.randlora_gamma["random"].unique().tolist() == [torch.tensor(1 / layer.out_features).item()]

    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_(generator=torch.Generator().manual_seed(p.numel())).mul_(0.1)
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(torch.float32), tmp_path)
    assert loaded.peft_config["default"].randlora_alpha == alpha
    torch.testing.assert_close(loaded.eval()(IDS), model(IDS))
    read = randlora.RandLoraModel.from_pretrained(net(torch.float32), tmp_path)
    torch.testing.assert_close(read(IDS), model(IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("alpha", ["Auto", ""])
def test_errors_leave_the_model_and_the_config(alpha):
    base, config = net(), auto(randlora_alpha=alpha)
    with pytest.raises(TypeError, match="randlora_alpha must be a number or 'auto'"):
        peft.get_peft_model(base, config)
    assert config.randlora_alpha == alpha and type(base.layers[0].up_proj) is nn.Linear
    config = auto(target_modules=["up_proj", "embed"])  # PEFT comes to the second one later
    with pytest.raises(ValueError):
        peft.get_peft_model(base, config)
    assert config.randlora_alpha == "auto"


def test_a_config_that_is_used_again_goes_by_the_rule_again(tmp_path):
    """PEFT's models keep the object that they are given, so that it has the first model's number then."""
    config = auto()
    first = peft.get_peft_model(net(torch.float32), config)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["randlora_alpha"] == config.randlora_alpha
    for again in (config, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        second = peft.get_peft_model(net(torch.float32), again)
        for (name, p), q in zip(first.named_parameters(), second.parameters(), strict=True):
            assert torch.equal(p, q), name
    config.r, config.target_modules = 3, {"down_proj"}
    other = peft.get_peft_model(net(torch.float32), config)
    fresh = peft.get_peft_model(net(torch.float32), auto(r=3, target_modules=["down_proj"]))
    assert config.randlora_alpha == fresh.peft_config["default"].randlora_alpha
    for (name, p), q in zip(other.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q), name
    # What comes from a file has the number alone.
    read = peft.get_peft_model(net(torch.float32), peft.RandLoraConfig.from_pretrained(tmp_path))
    layer = read.base_model.model.layers[0].up_proj
    assert layer.randlora_gamma["default"].unique().item() == pytest.approx(1 / min(layer.weight.shape))


def test_injected_once_more_under_one_name_other_layers_keep_what_they_have_learned():
    model = peft.inject_adapter_in_model(auto(target_modules=["up_proj"]), net(torch.float32))
    layer = model.layers[0].up_proj
    scaling, gamma = layer.scaling["default"], layer.randlora_gamma["default"]
    with torch.no_grad():
        gamma.fill_(7.0)
    peft.inject_adapter_in_model(auto(target_modules=["down_proj"]), model)
    assert layer.randlora_gamma["default"] is gamma and (gamma == 7).all() and layer.scaling["default"] == scaling
    alone = peft.inject_adapter_in_model(auto(target_modules=["down_proj"]), net(torch.float32))
    for part in ("scaling", "randlora_gamma"):
        new, other = (getattr(m.layers[0].down_proj, part)["default"] for m in (model, alone))
        assert torch.equal(torch.as_tensor(new), torch.as_tensor(other)), part
