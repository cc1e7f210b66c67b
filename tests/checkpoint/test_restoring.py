"""Saved numbers go back into the adapters that a model has: into the same parameters, all of them or none."""

import shutil

import pytest
import torch
from helpers.checkpoints import WEIGHTS
from helpers.failing import calls_of, fail_at
from helpers.models import IDS, adapt, add, assert_unchanged, layers_of, net, randomize, snapshot

from randlora import RandomBases
from randlora.checkpoint.restoring import holds_adapters, restore


def several():
    """Adapters on different layers, of different ranks and kinds; one that is not trained, and what goes with them."""
    model = adapt(net(), modules_to_save=["head"], bias="randlora_only")
    add(model, "b", 2, r=3, kind="sparse", target_modules=["q_proj"], save_projection=False)
    model.set_adapter("default")
    return model


def changed(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5)
    return randomize(model, "b", seed=9) if "b" in model.peft_config else model


def test_numbers_come_back_into_the_same_parameters(tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    assert holds_adapters(model, tmp_path) and not holds_adapters(model, tmp_path / "none")
    before = snapshot(model)
    parameters = [id(p) for p in model.parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    changed(model)
    assert any(not torch.equal(value, model.state_dict()[name]) for name, value in before[0].items())
    restore(model, tmp_path)
    assert_unchanged(model, before)
    assert parameters == [id(p) for p in model.parameters()]
    model(IDS).sum().backward()
    optimizer.step()
    assert all(not torch.equal(before[0][name], p) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 5}, "r must be 4, got 5"),
        ({"randlora_alpha": 4}, "randlora_alpha must be 3, got 4"),
        ({"bias": "randlora_only"}, "bias must be none, got randlora_only"),
        ({"num_bases": 2}, "num_bases at 'layers.0.q_proj' must be 4, got 2"),
        ({"target_modules": ["q_proj"]}, "layers that are not in both: layers.0.down_proj"),
        ({"modules_to_save": ["head"]}, r"modules_to_save that are not in both: head"),
        ({"projection_prng_key": 7}, "bases must be RandomBases.*got RandomBases"),
        ({"kind": "sparse"}, "bases must be RandomBases"),
    ],
)
def test_another_adapter_is_refused_and_nothing_is_changed(tmp_path, settings, message):
    adapt(net(), seed=8, **settings).save_pretrained(tmp_path)
    model = adapt(net())
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"is not of this model's adapter 'default': {message}"):
        restore(model, tmp_path)
    assert_unchanged(model, before)


def test_a_missing_or_damaged_file_of_one_adapter_leaves_the_others_alone(tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    before = snapshot(changed(model))
    weights = tmp_path / "b" / WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="is damaged"):
        restore(model, tmp_path)
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ValueError, match=str(tmp_path / "b")):
        restore(model, tmp_path)
    assert_unchanged(model, before)


def test_what_fails_in_the_middle_is_undone(tmp_path):
    model = several()
    model.save_pretrained(tmp_path)
    total = calls_of(restore, model, tmp_path)
    changed(model)
    before = snapshot(model)
    failed = 0
    for k in range(total - 400, total, 13):
        if fail_at(k, restore, model, tmp_path) is not None:
            failed += 1
            assert_unchanged(model, before)
        else:
            changed(model)
            before = snapshot(model)
    assert failed > 20


def test_dropout_and_what_a_default_is_called_may_differ(tmp_path):
    adapt(net(), seed=8, randlora_dropout=0.1, num_bases=4, save_projection=False).save_pretrained(tmp_path)
    model = adapt(net(), randlora_dropout=0.2).eval()
    restore(model, tmp_path)
    assert torch.equal(model(IDS), adapt(net(), seed=8).eval()(IDS))


def test_equal_bases_of_another_object_will_do(tmp_path):
    model = adapt(net(), seed=8).eval()
    model.save_pretrained(tmp_path)
    expected, own = model(IDS), RandomBases(50, 40, 4, seed=0)
    for layer in layers_of(randomize(model)).values():
        layer.bases["default"] = own
    restore(model, tmp_path)
    assert torch.equal(model(IDS), expected)
