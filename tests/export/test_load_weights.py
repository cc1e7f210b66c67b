"""Stand-ins for the Llamas of vLLM and SGLang take each tensor of a merged model by name and shape; none is missing."""

import copy

import pytest
import torch
from helpers.models import adapt, add, tiny_llama
from helpers.servers import ServedLlama

pytest.importorskip("transformers")


TARGETS = {"target_modules": ["q_proj", "k_proj", "o_proj", "gate_proj", "down_proj"], "randlora_alpha": 0.5}


def merged(model):
    return copy.deepcopy(model).merge_and_unload().state_dict()


def assert_served(model, *ways):
    expected, served = merged(model), ServedLlama(model.model.config, model.model.dtype)
    for weights in ways:
        served.begin()
        served.load_weights(weights())
        got = served.end()
        assert got.keys() == expected.keys()
        assert all(
            torch.equal(value.view(torch.uint8), got[name].view(torch.uint8)) for name, value in expected.items()
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_tensor_has_its_place(dtype, tied):
    model = adapt(tiny_llama(tie_word_embeddings=tied).to(dtype), modules_to_save=["norm"], **TARGETS)
    add(model, "b", 2, kind="sparse", r=3, target_modules=["v_proj", "up_proj"], randlora_alpha=0.5)
    ways = (
        model.merged_tensors,
        lambda: model.merged_tensors(original_names=True),
        lambda: ((name, tensor) for name, tensor in merged(model).items()),
    )
    for active in (["default"], ["default", "b"], ["b"]):
        model.set_adapter(active)
        assert_served(model, *ways)
    model.merge_adapter(["b"])
    assert_served(model, *ways)
    # What modules share comes once, and nothing else is left out.
    names, sent = ([n for n, _ in model.merged_tensors(original_names=original)] for original in (False, True))
    assert sorted(sent) == sorted(set(names) - ({"lm_head.weight"} if tied else set())) and len(set(sent)) == len(sent)


def test_the_stand_in_complains():
    model = adapt(tiny_llama(), **TARGETS)
    served = ServedLlama(model.model.config)
    weights = dict(model.merged_tensors())
    name = "model.layers.1.mlp.up_proj.weight"
    for wrong, message in (
        (model.model.named_parameters(), r"no module or parameter named 'model.layers.0.self_attn.q_proj.base_layer"),
        ([(name, weights[name].T)], "up_proj"),
        ([(name, weights[name].half())], "up_proj"),
        ([(name, weights[name])] * 2, "comes twice"),
    ):
        served.begin()
        with pytest.raises((ValueError, AssertionError), match=message):
            served.load_weights(wrong)
    served.begin()
    served.load_weights((n, t) for n, t in weights.items() if n != name)
    with pytest.raises(AssertionError, match=rf"not loaded: \['{name}'\]"):
        served.end()


def test_a_head_that_is_trained_apart_comes_on_its_own():
    """The model ties it, the merged one does not: both tensors are sent."""
    model = adapt(tiny_llama(tie_word_embeddings=True), modules_to_save=["lm_head"], **TARGETS)
    with torch.no_grad():
        model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    sent = dict(model.merged_tensors(original_names=True))
    assert torch.equal(sent["lm_head.weight"], 2 * sent["model.embed_tokens.weight"])
