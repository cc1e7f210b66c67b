"""Merging into the weights of a model, also where they are used twice, and unloading."""

import pytest
import torch
from helpers.models import (
    IDS,
    adapt,
    add,
    assert_computes,
    assert_unchanged,
    layers_of,
    merged_by_hand,
    net,
    numbered,
    snapshot,
    tiny_llama,
)
from torch import nn
from torch.testing import assert_close

# ---- merging ----


def test_merge_and_unmerge():
    model = adapt(net())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert_computes(model, [], plain=merged_by_hand(net(), model, ["default"]))
    model.unmerge_adapter()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
    assert_computes(model, ["default"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_merge_and_unload(dtype):
    plain = net(dtype).eval()
    modules = {name: module for name, module in plain.named_modules()}
    model = adapt(plain, target_modules="all-linear")
    by_hand = merged_by_hand(net(dtype), model, ["default"])
    merged = model.merge_and_unload(progressbar=False, safe_merge=True)
    assert merged is plain and {n: m for n, m in merged.named_modules()} == modules
    for (name, p), exact in zip(merged.named_parameters(), by_hand.parameters(), strict=True):
        assert_close(p, exact.to(dtype), rtol=1e-12 if dtype == torch.float64 else 0, atol=1e-14, msg=name)


def test_unload_gives_the_base_model_back():
    plain = net()
    model = adapt(plain, target_modules="all-linear", modules_to_save=["embed"])
    with torch.no_grad():
        model.model.embed.modules_to_save["default"].weight.zero_()
    model.merge_adapter()
    assert model.unload() is plain
    assert plain.state_dict().keys() == net().state_dict().keys() and torch.equal(plain(IDS), net()(IDS))


def test_safe_merge_takes_everything_back():
    model = adapt(net())
    add(model, "b", 2, target_modules=["v_proj", "down_proj"])
    model.merge_adapter(["default"])
    before, merged = snapshot(model), {p: layer.merged_adapters.copy() for p, layer in layers_of(model).items()}
    with torch.no_grad():
        gamma = model.model.layers[1].v_proj.randlora_gamma["b"]
        gamma[0, 0], number = float("nan"), gamma[0, 0].item()
    with pytest.raises(ValueError, match="merging b gives NaN or infinity"):
        model.merge_adapter("b", safe_merge=True)
    with torch.no_grad():
        gamma[0, 0] = number
    assert_unchanged(model, before)
    assert {p: layer.merged_adapters for p, layer in layers_of(model).items()} == merged
    model.unmerge_adapter()
    assert_computes(model, ["default"])


def test_names_to_merge():
    model = adapt(net())
    for call in (model.merge_adapter, lambda adapter_names: model.merge_and_unload(adapter_names=adapter_names)):
        for names in (["defualt"], "defualt"):
            before = snapshot(model)
            with pytest.raises(ValueError, match="no adapter named 'defualt'; it has: default"):
                call(adapter_names=names)
            assert_unchanged(model, before)
    expected = merged_by_hand(net(), model, ["default"])(IDS)
    assert_close(model.merge_and_unload(adapter_names="default")(IDS), expected)


# ---- modules and weights that are used twice ----


def test_tied_modules_stay_tied():
    shared = nn.Linear(6, 6)
    model = adapt(numbered(nn.Sequential(shared, nn.Tanh(), shared).double()), target_modules=["0"])
    x = torch.ones(2, 6, dtype=torch.float64)
    before = model(x)
    assert model.model[0] is model.model[2] and len(layers_of(model)) == 1
    merged = model.merge_and_unload()
    assert merged[0] is merged[2] is shared
    assert_close(merged(x), before)


@pytest.mark.parametrize("unload", [True, False])
def test_tied_weights_are_parted_by_merging(unload):
    model = adapt(tiny_llama(tie_word_embeddings=True).double(), target_modules=["lm_head"])
    assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
    before, embedding = model(IDS).logits, model.model.model.embed_tokens.weight.clone()
    with pytest.warns(UserWarning, match=r"'lm_head' shares its weight with model\.embed_tokens"):
        merged = model.merge_and_unload() if unload else (model.merge_adapter(), model)[1]
    assert_close(merged(IDS).logits, before)
    assert torch.equal(merged.get_input_embeddings().weight, embedding) and not merged.config.tie_word_embeddings


def test_two_layers_with_one_weight():
    plain = numbered(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double())
    plain[2].weight = plain[0].weight
    model = adapt(plain, target_modules="all-linear")
    x = torch.ones(2, 6, dtype=torch.float64)
    before = model(x)
    with pytest.warns(UserWarning, match="'0' shares its weight with 2") as caught:
        model.merge_adapter()
    assert len(caught) == 1
    assert_close(model(x), before)
