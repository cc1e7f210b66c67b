"""Errors in the middle leave a PEFT model as it was."""

import copy

import pytest
import torch
from helpers.common import normal
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from helpers.peft_models import (  # noqa: E402
    adapt,
    adapted,
    assert_unchanged,
    both,
    broken,
    config,
    llama,
    logits,
    randomize,
    state,
    version,
)

import randlora.integrations.peft as integration  # noqa: E402
from randlora.integrations.peft import layer as peft_layer  # noqa: E402
from randlora.integrations.peft import model as peft_model  # noqa: E402

# ---- adding an adapter ----


class Mixed(nn.Module):
    """What PEFT adapts, with what it refuses in between."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 4)
        self.several, self.empty = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(0, 4)
        self.untouched = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.several[0](self.last(self.first(x)))


FAILING = {
    "unsupported layer": ({"target_modules": ["first", "conv", "last"]}, "Conv1d.* is not supported"),
    "no rank": ({"target_modules": ["first"], "r": 0}, "r must be at least 1, got 0"),
    "huge rank": ({"target_modules": ["first", "last"], "r": 10**30}, "r must be at most 65536, got 1000"),
    "too large": ({"target_modules": ["first", "last"], "r": 10**14}, "r must be at most 65536, got 1000"),
    "no size": ({"target_modules": ["first", "empty"]}, "'empty' cannot be adapted: .* size 0 -> 4"),
    "huge seed": (
        {"target_modules": ["first", "last"], "projection_prng_key": 10**30},
        "projection_prng_key must be between .*, got 1000",
    ),
    "no target": ({"target_modules": ["nothing"]}, "'nothing'.* not found|No (?:layers types|modules were)"),
    # Of the adapter that is there "last" is a module to save: PEFT comes to that first.
    "unsupported module to save": (
        {"target_modules": ["first", "last"], "modules_to_save": ["several"]},
        "(?s)modules_to_save cannot be applied to .*ModuleList|ModulesToSaveWrapper.* is not supported",
    ),
}


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject", "inject again"])
@pytest.mark.parametrize("arguments, message", FAILING.values(), ids=FAILING)
def test_adapters_are_added_whole_or_not_at_all(arguments, message, how):
    model = Mixed()
    wrong = peft.RandLoraConfig(**{"r": 2, **arguments})
    with integration.enable():
        if how == "add_adapter":
            model = peft.get_peft_model(model, config("first", r=3, modules_to_save=["last"]))
            call = lambda: model.add_adapter("b", wrong)  # noqa: E731
        elif how == "get_peft_model":
            call = lambda: peft.get_peft_model(model, wrong)  # noqa: E731
        else:
            if how == "inject again":
                peft.inject_adapter_in_model(config("first", r=3), model)
            call = lambda: peft.inject_adapter_in_model(wrong, model, "b")  # noqa: E731
        randomize(model)
        before, output = state(model), model(normal(2, 8))
        with pytest.raises((ValueError, TypeError), match=message):
            call()
    assert_unchanged(model, before)
    assert torch.equal(model(normal(2, 8)), output)
    if how == "add_adapter":  # the name is free
        model.add_adapter("b", config("first", r=2))


@pytest.mark.parametrize("at", ["layer", "wrapper", "bases"])
def test_memory_runs_out(at, monkeypatch):
    """In the middle of what is ours, too."""
    model = adapt(llama(), config("q_proj", r=3))
    before, calls = state(model), []

    def fail_at_the_third(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return real(*arguments, **keywords)

    if at == "layer":
        real = peft_model.convert
        monkeypatch.setattr(peft_model, "convert", fail_at_the_third)
    elif at == "wrapper":
        real = copy.deepcopy
        monkeypatch.setattr("peft.utils.other.copy.deepcopy", fail_at_the_third)
    else:
        real, calls = peft_model.disable_fast_path, [1, 2]
        monkeypatch.setattr(peft_model, "disable_fast_path", fail_at_the_third)
    with pytest.raises(MemoryError):
        saved = ["embed_tokens", "lm_head", "norm"]
        model.add_adapter("b", config("q_proj", "v_proj", "k_proj", r=2, modules_to_save=saved))
    monkeypatch.undo()
    assert_unchanged(model, before)
    model.add_adapter("b", config("q_proj", "v_proj", r=2, modules_to_save=["embed_tokens", "lm_head"]))


def test_accelerate_is_undone(monkeypatch):
    model = adapt(llama(torch.bfloat16), config("q_proj", "v_proj"), False)
    before, real, calls = state(model), peft_model.convert, []

    def fail_at_the_third(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        return real(layer)

    monkeypatch.setattr(peft_model, "convert", fail_at_the_third)
    with pytest.raises(MemoryError):
        integration.accelerate(model)
    assert_unchanged(model, before)
    assert type(model.base_model) is peft.RandLoraModel and len(calls) == 3
    logits(model)
    monkeypatch.undo()
    assert type(integration.accelerate(model).base_model) is peft_model.AcceleratedRandLoraModel


@pytest.mark.skipif(version < (0, 21), reason="PEFT does otherwise in earlier versions")
def test_a_second_adapter_without_targets_is_refused_as_by_peft():
    found = []
    for model in both(llama(), config("q_proj")):
        with pytest.raises(ValueError) as error:
            model.add_adapter("b", config("nothing"))
        found.append((error.type, str(error.value)))
        assert list(model.peft_config) == ["default"]
    assert found[0] == found[1]


@pytest.mark.parametrize("name", ["a\0b", "a\nb", "\ud800", "x" * 201, "\u00e9" * 101])
def test_names_that_cannot_be_saved_are_refused_before_training(name):
    model = adapt(llama(), config("q_proj", r=3))
    before = state(model)
    with pytest.raises(ValueError, match="adapter_name must"):
        model.add_adapter(name, config("v_proj"))
    assert_unchanged(model, before)
    with integration.enable():
        with pytest.raises(ValueError, match="adapter_name must"):
            peft.get_peft_model(llama(), config("v_proj"), name)
        peft.get_peft_model(llama(), config("v_proj"), "\u00e9" * 100)


# ---- merging ----


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_safe_merge_changes_all_layers_or_none(dtype, how, already):
    model = adapt(llama(dtype), config("q_proj", "v_proj", "lm_head", r=3))
    model.add_adapter("b", config("q_proj", "up_proj", r=2))
    randomize(model, seed=3)
    if already:
        model.merge_adapter(["b"])
    broken(model)
    before = state(model)
    with pytest.raises(ValueError, match="nothing was changed"):
        getattr(model, how)(safe_merge=True)
    assert_unchanged(model, before)
    assert all(layer._unmerged_weight is None for layer in adapted(model) if not layer.merged)
    assert sum(layer.merged for layer in adapted(model)) == (4 if already else 0)
    model.unmerge_adapter()
    assert torch.equal(adapted(model)[0].base_layer.weight, llama(dtype).model.layers[0].self_attn.q_proj.weight)
    merged = model.merge_and_unload(adapter_names=["b"], safe_merge=True)
    assert not adapted(merged) and torch.isfinite(logits(merged)).all()


def test_memory_runs_out_in_merging(monkeypatch):
    model = adapt(llama(), config("q_proj", "v_proj", r=3))
    before, calls, real = state(model), [], peft_layer.AcceleratedLinear.get_delta_weight

    def fail_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(peft_layer.AcceleratedLinear, "get_delta_weight", fail_at_the_third)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert_unchanged(model, before)


def test_unmerging_changes_all_layers_or_none():
    with integration.enable():
        plain = nn.Sequential(nn.Linear(12, 9), nn.Linear(9, 12))
        model = peft.get_peft_model(plain, peft.RandLoraConfig(r=4, target_modules=["0", "1"]))
    model.merge_adapter()
    layers = [model.base_model.model[i] for i in (0, 1)]
    prune.l1_unstructured(layers[1].base_layer, "weight", 0.5)
    with pytest.raises(ValueError, match="no parameter but computed anew"):
        model.unmerge_adapter()
    assert all(layer.merged for layer in layers)
    prune.remove(layers[1].base_layer, "weight")
    model.unmerge_adapter()
    assert not any(layer.merged for layer in layers)


def test_all_layers_are_looked_at_before_the_first_is_unloaded():
    model = adapt(llama(), config("q_proj", "v_proj", r=3))
    weight_norm(adapted(model)[-1].base_layer)
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="computed anew"):
            merge()
        assert_unchanged(model, before)


def test_unloading_that_fails_half_way_can_go_on(monkeypatch):
    """Without safe_merge no weights are kept: outputs are the same, and a second call does the rest."""
    model = adapt(llama(), config("q_proj", "v_proj", r=3))
    expected = logits(model)
    last = adapted(model)[-1]
    monkeypatch.setattr(last, "get_delta_weight", lambda *_: torch.empty(2**60), raising=False)
    with pytest.raises(RuntimeError, match=r"can't allocate memory|not enough memory"):
        model.merge_and_unload()
    monkeypatch.delattr(last, "get_delta_weight")
    for _ in range(2):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
        model = model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
    assert not adapted(model)
