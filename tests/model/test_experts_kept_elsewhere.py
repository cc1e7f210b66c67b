"""Experts whose weights are not there between calls: offloaded by accelerate, or partitioned as ZeRO-3 does."""

import copy

import pytest
import torch
from helpers.experts_cases import tiny
from helpers.models import IDS, randomize
from helpers.partitioned import partitioned

import randlora

SETTINGS = {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def adapted(model):
    return randomize(randlora.get_peft_model(model, SETTINGS))


def gradients(model):
    model.zero_grad()
    model(IDS).logits.square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_close(got, expected):
    """The linear layer beside the experts takes another strategy, and transformers' norms compute in fp32."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * b.abs().max().item())


@pytest.mark.parametrize("first", ["offloaded", "adapted"])
@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_offloaded_by_accelerate(first, way, tmp_path):
    from helpers.offloading import offloaded

    plain = tiny("GptOss")
    there = adapted(copy.deepcopy(plain))
    logits, expected = there(IDS).logits, gradients(there)
    if first == "offloaded":
        model = adapted(offloaded(plain, way, tmp_path))
        assert_close(gradients(model), expected)
    else:
        model = adapted(plain)
        offloaded(model.model, way, tmp_path)
        with pytest.raises(RuntimeError, match="their gradients would be lost"):
            gradients(model)
    experts = model.model.model.layers[1].mlp.experts
    assert experts.base_layer.down_proj.is_meta
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits)
        model.merge_adapter()
        torch.testing.assert_close(model(IDS).logits, logits, rtol=2e-6, atol=2e-6)
        model.unmerge_adapter()
        assert torch.equal(model(IDS).logits, logits)
        with model.disable_adapter():
            torch.testing.assert_close(model(IDS).logits, there.unload()(IDS).logits)


def test_partitioned_as_zero_3_does(monkeypatch, tmp_path):
    plain = tiny("Mixtral")
    model = adapted(copy.deepcopy(plain))
    logits, expected = model(IDS).logits, gradients(model)
    partitioned(model, monkeypatch)
    assert model.model.model.layers[0].mlp.experts.base_layer.gate_up_proj.numel() == 0
    assert torch.equal(model(IDS).logits, logits)
    assert_close(gradients(model), expected)
    with pytest.raises(ValueError, match="ZeRO-3"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(randlora.RandLoraModel.from_pretrained(plain, tmp_path)(IDS).logits, logits)


def test_partitioned_before_it_is_adapted(monkeypatch):
    plain = tiny("Mixtral")
    partitioned(plain, monkeypatch, hooks=False)
    model = adapted(plain)
    assert list(model.model.model.layers[0].mlp.experts.gate_up_proj.randlora_lambda["default"].shape) == [5, 3, 6]
    with pytest.raises(ValueError, match="gate_up_proj is kept in parts by DeepSpeed's ZeRO-3"):
        model.model.model.layers[0].mlp.experts(
            torch.zeros(1, 16, dtype=torch.float64), *[torch.zeros(1, 2).long()] * 2
        )
