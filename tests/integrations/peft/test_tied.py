"""Merging under PEFT where weights are tied, and where modules are saved in full."""

import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from helpers.peft_models import (  # noqa: E402
    adapt,
    assert_unchanged,
    broken,
    config,
    llama,
    logits,
    randomize,
    state,
    tied_llama,
    version,
)
from torch.testing import assert_close  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402

TIED = {"target": ("lm_head", "q_proj"), "saved head": ("q_proj",), "saved embeddings": ("q_proj",)}


@pytest.mark.parametrize("how", ["merge_and_unload", "safe", "merge_adapter", "accelerated"])
@pytest.mark.parametrize("what", TIED)
def test_merging_leaves_tied_weights_alone(what, how, tmp_path):
    """PEFT adds the update to the embeddings as well where ``lm_head`` is a target."""
    saved = {"saved head": ["lm_head"], "saved embeddings": ["embed_tokens"]}.get(what)
    model = adapt(tied_llama(), config(*TIED[what], r=3, modules_to_save=saved), how != "accelerated")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.mul_(-0.5)
    if how == "accelerated":
        integration.accelerate(model)
    embeddings, output = model.base_model.model.model.embed_tokens.weight.clone(), logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if how == "merge_adapter":
            model.merge_adapter()
            assert_close(logits(model), output, rtol=1e-4, atol=1e-4)
            model.unmerge_adapter()
            assert_close(logits(model), output, rtol=1e-4, atol=1e-4)
            model.merge_adapter()
        plain = model.merge_and_unload(**({"safe_merge": True} if how == "safe" else {}))
    assert torch.equal(plain.model.embed_tokens.weight, embeddings)
    assert_close(logits(plain), output, rtol=1e-4, atol=1e-4)
    if version >= (0, 20) or not saved:
        assert plain.config.tie_word_embeddings is False
        plain.save_pretrained(tmp_path)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        assert_close(logits(again), output, rtol=1e-4, atol=1e-4)


def test_tied_weights_stay_tied_where_merging_fails():
    model = adapt(tied_llama(), config("lm_head", "q_proj", r=3))
    broken(model)
    before = state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="nothing was changed"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merge(safe_merge=True)
        assert_unchanged(model, before)
    base = model.base_model.model
    assert base.lm_head.base_layer.weight is base.model.embed_tokens.weight and base.config.tie_word_embeddings


def test_unloading_takes_the_copies_of_the_adapters_that_it_merges():
    """PEFT takes those of the active adapter."""
    model = adapt(llama(), config("q_proj", r=3, modules_to_save=["lm_head"]))
    model.add_adapter("b", config("v_proj", r=2, modules_to_save=["lm_head"]))
    randomize(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["b"].weight.mul_(-2)
    model.set_adapter("b")
    expected = logits(model)
    model.set_adapter("default")
    assert_close(logits(model.merge_and_unload(adapter_names=["b"])), expected, rtol=1e-4, atol=1e-4)
