"""Parameters that DeepSpeed's ZeRO-3 partitions, by a stand-in for it: gathered for calls, refused elsewhere."""

import copy

import pytest
import torch
from helpers.models import IDS, adapt, layers_of, net, randomize, tiny_gpt2
from helpers.partitioned import partitioned
from torch import nn

import randlora
from randlora.distributed import zero3


def numbers(model, zero):
    return {name: zero.numbers[p.ds_id] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", ["dense", "hadamard"])
def test_calls_have_the_parameters_whole(kind, monkeypatch):
    expected = adapt(net(), kind=kind, modules_to_save=["head"])
    model = copy.deepcopy(expected)
    zero = partitioned(model, monkeypatch)
    assert all(p.numel() == 0 for p in model.parameters())
    for m in (expected, model):
        m(IDS).square().sum().backward()
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-12, atol=1e-12)
    gradients = {name: p.grad for name, p in expected.named_parameters() if p.requires_grad}
    assert gradients.keys() == numbers(model, zero).keys()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(
            model.eval()(IDS, adapter_names=["default", "__base__"] * 2),
            expected.eval()(IDS, adapter_names=["default", "__base__"] * 2),
        )


def test_an_adapter_that_is_added_later_is_not_partitioned(monkeypatch):
    expected, model = adapt(net()), adapt(net())
    partitioned(model, monkeypatch)
    for m in (expected, model):
        m.add_adapter("b", randlora.RandLoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
        randomize(m, "b", 7)
        m.set_adapter(["default", "b"])
    torch.testing.assert_close(model(IDS), expected(IDS))


def test_what_others_register_for_a_layer_is_gathered_too():
    layer = randlora.Linear(nn.Linear(5, 7), r=2)
    other = nn.Parameter(torch.zeros(3))
    layer._external_params[id(other)] = other  # as deepspeed.zero.register_external_parameter does
    assert [p is other for _, p in layer.ds_external_parameters()] == [True]
    layer.randlora_lambda["default"].ds_id = 0
    assert len(list(layer.ds_external_parameters())) == 2


def test_saving_gathers_or_takes_a_gathered_state_dict(monkeypatch, tmp_path):
    model = adapt(net(), modules_to_save=["head"])
    model.save_pretrained(tmp_path / "expected")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    partitioned(model, monkeypatch)
    model.save_pretrained(tmp_path / "gathered")
    assert all(p.numel() == 0 for p in model.parameters())
    model.save_pretrained(tmp_path / "given", state_dict=state)
    wrong = state | {name: value[:1] for name, value in state.items() if name.endswith("q_proj.randlora_gamma.default")}
    with pytest.raises(ValueError, match=r"of shape \[1, 13\], where this model's is \[4, 13\]"):
        model.save_pretrained(tmp_path / "wrong", state_dict=wrong)
    wanted = (tmp_path / "expected" / "adapter_model.safetensors").read_bytes()
    for folder in ("gathered", "given"):
        assert (tmp_path / folder / "adapter_model.safetensors").read_bytes() == wanted


def test_a_partitioned_base_model_is_adapted_and_loaded_into(monkeypatch, tmp_path):
    expected = adapt(net(), modules_to_save=["head"])
    with torch.no_grad():
        expected.model.head.modules_to_save["default"].weight.mul_(1.5)
    expected.save_pretrained(tmp_path)
    base = net()
    zero = partitioned(base, monkeypatch, hooks=False)
    model = randlora.RandLoraModel.from_pretrained(base, tmp_path, is_trainable=True)
    with zero.GatheredParameters(p for p in model.parameters() if zero3.is_partitioned(p)):
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-6, atol=1e-6)
    assert model.get_nb_trainable_parameters() == expected.get_nb_trainable_parameters()
    for module in model.modules():  # DeepSpeed takes what is new when the engine is made
        assert not any(
            zero3.is_partitioned(p) for p in module._parameters.values() if p is not None and p.requires_grad
        )
    assert len(zero.numbers) == len(list(net().parameters()))


def test_sizes_are_those_of_the_whole(monkeypatch):
    base, gpt2 = net(), tiny_gpt2()  # transformers looks for DeepSpeed
    partitioned(base, monkeypatch, hooks=False)
    config = randlora.RandLoraConfig(r=4, target_modules="all-linear", modules_to_save=["head"], bias="all")
    whole, parts = (randlora.estimate(m, config, tokens=20, inputs=(IDS,)) for m in (net(), base))
    assert whole == parts
    partitioned(gpt2, monkeypatch)
    model = randlora.get_peft_model(gpt2, {"r": 4, "target_modules": ["c_attn"]})
    assert {(layer.in_features, layer.out_features) for layer in layers_of(model).values()} == {(24, 72)}
    with pytest.raises(ValueError, match=r"must have shape \[5, 13\], got \[13, 13\]"):
        layer = base.layers[0].q_proj
        layer.out_features = 5
        randlora.Linear(layer)


def test_merging_and_what_else_writes_needs_them_gathered(monkeypatch):
    model = adapt(net())
    model.add_adapter("b", randlora.RandLoraConfig(r=4, target_modules=["q_proj"]))
    expected = model(IDS).detach()
    zero = partitioned(model, monkeypatch)
    layer = model.model.layers[0].q_proj
    for attempt, what in (
        (model.merge_adapter, "the base layer's weight"),
        (model.merge_and_unload, "the base layer's weight"),
        (lambda: layer.get_delta_weight("default"), r"randlora_lambda\['default'\]"),
        (lambda: layer.get_scaled_bases("default"), r"randlora_lambda\['default'\]"),
        (lambda: layer.reset_randlora_parameters("default"), r"randlora_lambda\['default'\]"),
        (lambda: model.add_weighted_adapter(["default"], [0.5], "c"), "an adapter's parameter"),
    ):
        with pytest.raises(ValueError, match=what + r".* is kept in parts by DeepSpeed's ZeRO-3: .*GatheredParameters"):
            attempt()
    zero.gather(model.parameters())  # as a call may leave them
    for attempt in (model.merge_adapter, lambda: layer.reset_randlora_parameters("default")):
        with pytest.raises(ValueError, match="GatheredParameters"):
            attempt()
    before = {key: value.clone() for key, value in zero.numbers.items()}
    for method in (model.merge_adapter, model.unmerge_adapter):
        with zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            method()
        torch.testing.assert_close(model(IDS), expected)
        if model.model.layers[0].q_proj.merged:
            with pytest.raises(ValueError, match="GatheredParameters"):
                model.unmerge_adapter()
    assert all(torch.equal(value, before[key]) for key, value in zero.numbers.items())


def test_a_model_without_an_engine_says_what_it_lacks(monkeypatch):
    model = adapt(net())
    partitioned(model.model.layers, monkeypatch, hooks=False)
    with pytest.raises(ValueError, match="the base layer's weight is kept in parts by DeepSpeed's ZeRO-3"):
        model(IDS)
    attention = nn.MultiheadAttention(8, 2)
    partitioned(attention, monkeypatch)
    with pytest.raises(ValueError, match="kept in parts by DeepSpeed's ZeRO-3"):
        randlora.MultiheadAttention(attention)
