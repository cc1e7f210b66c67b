"""Hadamard adapters in PEFT's own models: it cannot name the kind, but their files load, and are computed fast."""

import copy

import pytest
import torch
from helpers.common import normal
from torch import nn

peft = pytest.importorskip("peft")

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402
from randlora.ops.pattern import is_signs  # noqa: E402


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 130), nn.Tanh(), nn.Linear(130, 64))


@pytest.fixture
def folder(tmp_path):
    config = randlora.RandLoraConfig(r=8, kind="hadamard", target_modules=["0", "2"], projection_prng_key=11)
    model = randlora.get_peft_model(base(), config)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "randlora_" in name:
                p.copy_(normal(*p.shape, seed=i) * 0.1)
    model.save_pretrained(tmp_path, for_peft=True)
    return model, tmp_path


def pattern_of(layer):
    found = layer.pattern("default")
    return found is not None and is_signs(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peft_computes_the_same_with_and_without_us(folder, dtype, tmp_path):
    model, path = folder
    x = normal(5, 96, dtype=dtype)
    plain = peft.PeftModel.from_pretrained(base().to(dtype), path)
    with integration.enable():
        fast = peft.PeftModel.from_pretrained(base().to(dtype), path, is_trainable=True)
    limit = 1e-5 if dtype == torch.float32 else 0.05
    exact = model(x.float())
    for other in (plain, fast):
        assert (other(x).float() - exact).abs().max() <= limit * exact.abs().max()
    assert pattern_of(fast.base_model.model[0]) and pattern_of(fast.base_model.model[2])
    fast(x).float().sum().backward()
    assert all(p.grad.isfinite().all() for p in fast.parameters() if p.requires_grad)
    # What PEFT saves again is read here, and by itself, as the same adapter.
    fast.save_pretrained(tmp_path / "again")
    ours = randlora.RandLoraModel.from_pretrained(base().to(dtype), tmp_path / "again")
    assert pattern_of(ours.model[0])
    assert (ours(x).float() - exact).abs().max() <= limit * exact.abs().max()


def test_a_model_that_exists_is_accelerated(folder):
    _, path = folder
    theirs = peft.PeftModel.from_pretrained(base(), path)
    x = normal(5, 96)
    before, parameters = theirs(x), dict(theirs.named_parameters())
    integration.accelerate(theirs)
    assert pattern_of(theirs.base_model.model[0])
    assert all(parameters[name] is p for name, p in theirs.named_parameters())
    for model in (theirs, copy.deepcopy(theirs).merge_and_unload()):
        assert (model(x) - before).abs().max() <= 1e-5 * before.abs().max()


@pytest.mark.parametrize("kind", ["hadamard", "dense"])
@pytest.mark.parametrize("enabled", [True, False])
def test_our_config_is_refused_by_pefts_get_peft_model_with_the_reason(kind, enabled):
    config, model = randlora.RandLoraConfig(r=8, kind=kind, target_modules=["0"]), base()
    before = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=r"give it to randlora\.get_peft_model, or peft\.RandLoraConfig to PEFT"):
        if enabled:
            with integration.enable():
                peft.get_peft_model(model, config)
        else:
            peft.get_peft_model(model, config)
    assert [type(m) for m in model.modules()] == before
