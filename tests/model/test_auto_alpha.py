"""``randlora_alpha="auto"`` for whole models: one number in config and files, a start of gamma in every layer."""

import dataclasses
import json

import pytest
import torch
from helpers.common import KINDS
from helpers.models import IDS, Net, layers_of, net, randomize
from helpers.offloading import offloaded
from torch import nn

import randlora
from randlora.checkpoint.layout import CONFIG_NAME
from randlora.layers.initial import GAIN, GAMMA, Shape, alpha_of

AUTO = {"r": 4, "randlora_alpha": "auto", "target_modules": "all-linear"}


def auto(**settings):
    return randlora.RandLoraConfig(**AUTO | settings)


def assert_on_the_rule(model, name="default"):
    """One alpha, equal gains, and gamma in the middle at GAMMA; returns alpha."""
    layers = layers_of(model, name).values()
    alpha = model.peft_config[name].randlora_alpha
    shapes = [Shape(layer.in_features, layer.out_features, layer.num_bases[name]) for layer in layers]
    assert isinstance(alpha, float) and alpha == alpha_of(model.peft_config[name].r, shapes)
    starts = []
    for layer, (i, o, n) in zip(layers, shapes, strict=True):
        assert layer.randlora_alpha[name] == alpha and layer.scaling[name] == alpha / layer.r[name]
        assert not layer.randlora_lambda[name].any()
        (start,) = layer.randlora_gamma[name].unique().tolist()
        assert start * layer.scaling[name] * n * layer.r[name] * (i / o) ** 0.5 == pytest.approx(GAIN, rel=1e-6)
        starts.append(torch.tensor(start).log())
    assert torch.stack(starts).mean().exp().item() == pytest.approx(GAMMA, rel=1e-5)
    return alpha


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_and_its_files(kind, dtype, tmp_path):
    config = auto(kind=kind)
    model = randlora.get_peft_model(net(dtype), config)
    alpha = assert_on_the_rule(model)
    assert config.randlora_alpha == "auto" and f"randlora_alpha={alpha}" in repr(model.peft_config["default"])
    assert model.peft_config["default"] == dataclasses.replace(
        model.peft_config["default"], randlora_alpha=json.loads(json.dumps(alpha))
    )
    randomize(model).save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_NAME).read_text())["randlora_alpha"] == alpha
    loaded = randlora.RandLoraModel.from_pretrained(net(dtype), tmp_path)
    assert torch.equal(loaded(IDS), model(IDS)) and loaded.peft_config["default"].randlora_alpha == alpha
    for (path, layer), other in zip(layers_of(model).items(), layers_of(loaded).values(), strict=True):
        assert layer.scaling == other.scaling, path

    # Once it is loaded nothing is left of the rule.
    again = randlora.get_peft_model(net(dtype), loaded.peft_config["default"])
    assert {layer.randlora_gamma["default"].unique().item() for layer in layers_of(again).values()} == {
        torch.tensor(1 / max(layer.randlora_gamma["default"].shape)).item() if dtype == torch.bfloat16
        else 1 / max(layer.randlora_gamma["default"].shape) for layer in layers_of(again).values()
    }  # fmt: skip
    (tmp_path / CONFIG_NAME).unlink()  # the metadata has the number, too
    assert randlora.RandLoraConfig.from_pretrained(tmp_path).randlora_alpha == alpha


def test_peft_reads_the_number(tmp_path):
    peft = pytest.importorskip("peft")
    model = randomize(randlora.get_peft_model(net(torch.float32), auto()))
    model.save_pretrained(tmp_path, for_peft=True)
    theirs = peft.PeftModel.from_pretrained(net(torch.float32), tmp_path)
    assert theirs.peft_config["default"].randlora_alpha == model.peft_config["default"].randlora_alpha
    torch.testing.assert_close(theirs(IDS), model(IDS), rtol=1e-3, atol=1e-3)
    ours = randlora.get_peft_model(net(), peft.RandLoraConfig(r=4, randlora_alpha="auto", target_modules=["up_proj"]))
    assert_on_the_rule(ours)


def test_several_adapters():
    model = randlora.get_peft_model(net(), auto())
    model.add_adapter("second", auto(r=3, num_bases=2, target_modules=["up_proj", "down_proj"]))
    model.add_adapter("third", auto(init_weights=False))
    assert len({assert_on_the_rule(model, name) for name in ("default", "second")}) == 2
    assert model.peft_config["third"].randlora_alpha == model.peft_config["default"].randlora_alpha
    for layer in layers_of(model).values():
        gamma, wide = layer.randlora_gamma["third"], max(layer.in_features, layer.out_features)
        assert layer.randlora_lambda["third"].all() and torch.equal(gamma, torch.full_like(gamma, 1 / wide))
    randomize(model, "second")
    model.add_weighted_adapter(["second"], [0.5], "halved")
    assert model.peft_config["halved"].randlora_alpha == model.peft_config["second"].randlora_alpha
    for layer in layers_of(model, "second").values():
        half, whole = layer.get_delta_weight("halved"), layer.get_delta_weight("second")
        torch.testing.assert_close(2 * half, whole)
        assert whole.any()


def test_hotswap_from_a_file_of_another_alpha(tmp_path):
    model = randomize(randlora.get_peft_model(net(), auto()), seed=5)
    expected = model(IDS)
    model.save_pretrained(tmp_path)
    other = randomize(randlora.get_peft_model(net(), auto(randlora_alpha=8)))
    other.hotswap(tmp_path)
    assert other.peft_config["default"].randlora_alpha == 8
    torch.testing.assert_close(other(IDS), expected)


class Mixed(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.attention, self.first, self.experts = nn.MultiheadAttention(12, 2, vdim=20), nn.Linear(12, 30), experts


def test_attentions_and_experts_count_as_their_layers():
    cases = pytest.importorskip("helpers.experts_cases")
    config = auto(target_modules=["attention", "first"], target_parameters=["experts.up_proj", "experts.down_proj"])
    model = randlora.get_peft_model(Mixed(cases.own(torch.float32)), config)
    assert len(layers_of(model)) == 4 + 1 + 2
    assert_on_the_rule(model)


@pytest.mark.parametrize("init_weights", [True, False])
def test_from_meta(init_weights):
    with torch.device("meta"):
        model = randlora.get_peft_model(Net(), auto(init_weights=init_weights))
    model.to_empty(device="cpu")
    assert_on_the_rule(model)


def test_offloaded(tmp_path):
    model = randlora.get_peft_model(net(torch.float32), auto())
    model.add_adapter("second", auto(r=3))
    moved = offloaded(model, "cpu", tmp_path)
    for layer in layers_of(moved).values():
        layer.reset_parameters()
    for name in ("default", "second"):
        starts = {path: layer._trained(name, torch.device("cpu"))[1].unique().item()
                  for path, layer in layers_of(moved, name).items()}  # fmt: skip
        assert starts == {path: torch.tensor(layer.initial_gamma[name]).item()
                          for path, layer in layers_of(moved, name).items()}  # fmt: skip


def test_a_config_without_a_model(tmp_path):
    config = auto()
    assert config.to_dict()["randlora_alpha"] == "auto"
    assert randlora.RandLoraConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="becomes a number where a model is adapted"):
        config.save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config.to_dict()))
    with pytest.raises(ValueError, match="randlora_alpha must be a number in a file, got 'auto'"):
        randlora.RandLoraConfig.from_pretrained(tmp_path)
    number = randlora.get_peft_model(net(), config).peft_config["default"].randlora_alpha
    first, second = (
        randlora.estimate(net(), auto(randlora_alpha=alpha), tokens=20, kinds="dense") for alpha in ("auto", number)
    )
    assert first == second
    numpy = pytest.importorskip("numpy")
    assert type(auto(randlora_alpha=numpy.float32(2.5)).randlora_alpha) is float


def test_a_file_that_says_auto_is_refused(tmp_path):
    model = randlora.get_peft_model(net(), auto())
    model.save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    path.write_text(path.read_text().replace(f'"randlora_alpha": {model.peft_config["default"].randlora_alpha}',
                                             '"randlora_alpha": "auto"'))  # fmt: skip
    with pytest.raises(ValueError, match="randlora_alpha='auto'"):
        randlora.RandLoraModel.from_pretrained(net(), tmp_path)
