"""What PEFT does with frozen adapters, trainable weights, deleted adapters: the same, or what it should do."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from helpers.peft_models import KINDS, adapt, adapted, both, config, llama, logits, randomize, tokens, version  # noqa: E402
from torch.testing import assert_close  # noqa: E402


@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_trainable_base_weights(kind, strategy):
    """FSDP makes them so."""
    theirs, ours = both(llama(), config("q_proj", "down_proj", **KINDS[kind]))
    for layer in adapted(ours):
        layer.strategy = strategy
    for model in (theirs, ours):
        model.requires_grad_(True)
        model(input_ids=tokens()).logits.square().sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3 * a.grad.abs().max().item(), msg=name)
    with torch.no_grad():
        assert_close(logits(ours.eval()), logits(theirs.eval()), rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(version < (0, 21), reason="earlier versions of PEFT delete what is merged")
@pytest.mark.parametrize("wrong", ["merged", "unknown"])
def test_deleting_is_refused_in_pefts_words(wrong):
    found = []
    for model in both(llama(), config("q_proj")):
        model.add_adapter("b", config("v_proj"))
        model.merge_adapter(["b"])
        with pytest.raises(ValueError) as error:
            model.delete_adapter("b" if wrong == "merged" else "c")
        found.append((error.type, str(error.value)))
        model.unmerge_adapter()
        model.delete_adapter("b")
    assert found[0] == found[1]


@pytest.mark.parametrize("how", ["disable_adapter", "layers", "modules"])
def test_frozen_adapters_stay_frozen(how):
    model = adapt(llama(), config("q_proj", modules_to_save=["lm_head"], inference_mode=True))
    model.add_adapter("b", config("v_proj", modules_to_save=["lm_head"]))
    if version >= (0, 18):
        model.set_requires_grad("b", True)

    def trained():
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    before = trained()
    if how == "disable_adapter":
        with model.disable_adapter():
            assert [name for name in trained() if "original_module" not in name] == []  # PEFT 0.18 trains that
    elif how == "layers":
        model.base_model.disable_adapter_layers()
        model.base_model.disable_adapter_layers()
        copied = copy.deepcopy(model)
        copied.base_model.enable_adapter_layers()
        assert [name for name, parameter in copied.named_parameters() if parameter.requires_grad] == before
        model.base_model.enable_adapter_layers()
    else:  # as transformers does it, where there is no tuner
        before = [name for name in before if "lm_head" not in name]
        for layer in adapted(model):
            layer.enable_adapters(False)
            layer.enable_adapters(True)
        assert [name for name in trained() if "lm_head" not in name] == before
        return
    assert trained() == before
    with model.disable_adapter():
        model.set_adapter("b")
    assert {name.split(".")[-1] for name in trained() if "randlora_" in name} == {"b"}


@pytest.mark.skipif(version < (0, 21), reason="earlier versions of PEFT fail beside the deleted copies")
@pytest.mark.parametrize("saved", [(1, 1, 0), (1, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 1)], ids=str)
def test_deleting_the_active_adapter_with_modules_to_save(saved):
    """The next one acts with its own copy, where it has one."""

    def settings(flag):
        return config("q_proj", modules_to_save=["lm_head"] if flag else None)

    model = adapt(llama(), settings(saved[0]))
    for name, flag in zip(("b", "c"), saved[1:], strict=True):
        model.add_adapter(name, settings(flag))
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.mul_(1 + len(name))
    for name in ("b", "c"):
        model.set_adapter(name)
        expected = logits(model)
        model.set_adapter("default" if name == "b" else "b")
        model.delete_adapter("default" if name == "b" else "b")
        assert model.active_adapters == [name]
        assert_close(logits(model), expected)
        for layer in adapted(model):
            assert set(layer.bases) == set(layer.randlora_lambda) == set(model.peft_config)
