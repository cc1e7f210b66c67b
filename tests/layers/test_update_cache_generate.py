"""``generate`` opens an inference cache and closes it: fast inside, nothing stale from one to the next."""

import pytest
import torch
from helpers.models import IDS, adapt, merged_by_hand, tiny_llama

import randlora
from randlora.layers import update_cache

transformers = pytest.importorskip("transformers")

SETTINGS = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}


def watched(scopes, error=None):
    """Notes the scope and its bytes after every word, and raises `error` after five."""

    def watch(ids, scores, **_):
        scopes.append((update_cache.current(), update_cache.current().nbytes))
        if error is not None and len(scopes) == 5:
            raise error
        return scores

    return {"logits_processor": transformers.LogitsProcessorList([watch])}


@pytest.mark.parametrize("more", [{}, {"num_beams": 3}, {"adapter_names": ["default"] * len(IDS)}], ids=str)
def test_words_are_those_of_the_merged_model(more):
    model = adapt(tiny_llama().double(), randlora_alpha=30).eval()
    plain, scopes = merged_by_hand(tiny_llama(), model, ["default"]), []
    expected = plain.generate(IDS, **SETTINGS, num_beams=more.get("num_beams", 1))
    assert torch.equal(model.generate(IDS, **SETTINGS, **more, **watched(scopes)), expected)
    assert len({scope for scope, _ in scopes}) == 1
    assert (scopes[-1][1] > 0) == ("adapter_names" not in more), "mixed batches compute their updates as usual"
    assert update_cache.current() is None and scopes[0][0].nbytes == 0


def test_writes_between_two_calls_are_seen():
    model = adapt(tiny_llama().double(), randlora_alpha=30).eval()
    for _ in range(3):
        expected = merged_by_hand(tiny_llama(), model, ["default"]).generate(IDS, **SETTINGS)
        assert torch.equal(model.generate(IDS, **SETTINGS), expected)
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name:
                parameter.data.mul_(-2)


def test_it_closes_when_something_is_raised():
    model = adapt(tiny_llama().double()).eval()
    scopes = []
    with pytest.raises(RuntimeError, match="mine"):
        model.generate(IDS, **SETTINGS, **watched(scopes, RuntimeError("mine")))
    assert update_cache.current() is None and scopes[0][0].nbytes == 0
    with pytest.raises(ValueError, match="adapter_names"):
        model.generate(IDS, **SETTINGS, adapter_names=["none such"] * len(IDS))
    assert update_cache.current() is None


def test_a_scope_around_it_serves_all_calls_and_decides_on_the_limit():
    model = adapt(tiny_llama().double()).eval()
    for limit in (0, 1 << 20):
        with randlora.inference_cache(limit) as outer:
            scopes = []
            for _ in range(2):
                model.generate(IDS, **SETTINGS, **watched(scopes))
            assert {scope for scope, _ in scopes} == {outer}
            assert (outer.nbytes > 0) == (limit > 0) == (scopes[-1][1] > 0)
