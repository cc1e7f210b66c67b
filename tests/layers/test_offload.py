"""Adapters on layers that accelerate offloads: on meta between calls, brought in by a hook for each of them."""

import copy

import pytest
import torch
from helpers.models import IDS, Net, adapt, layers_of, net, randomize, tiny_llama
from helpers.offloading import accelerate, offloaded, ways
from torch import nn

import randlora
from randlora.layers import offload

kinds = pytest.mark.parametrize("kind", ["dense", "sparse", "very_sparse"])


def with_numbers(model):
    """The adapters' parameters by name, wherever they are."""
    return {
        f"{path}.{part}": offload.read(getattr(layer, part), "default").detach().clone()
        for path, layer in layers_of(model).items()
        for part in ("randlora_lambda", "randlora_gamma")
    }


# ---- offloaded, then adapted ----


@ways
@kinds
def test_offloaded_before_adapting_trains_as_any_other(way, kind, tmp_path):
    expected = adapt(net(), kind=kind)
    model = adapt(offloaded(net(), way, tmp_path), kind=kind)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(p.device.type == "cpu" and p.dtype == torch.float64 for _, p in trained)
    assert any(p.is_meta for p in model.parameters())
    for m in (expected, model):
        (m(IDS) ** 2).sum().backward()
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-12, atol=1e-12)
    wanted = dict(expected.named_parameters())
    for name, parameter in trained:
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-10, atol=1e-10)


@ways
def test_an_optimizer_step_and_an_adapter_more(way, tmp_path):
    expected, model = adapt(net()), adapt(offloaded(net(), way, tmp_path))
    for m in (expected, model):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.01)
        (m(IDS) ** 2).sum().backward()
        optimizer.step()
        m.add_adapter("b", randlora.RandLoraConfig(r=3, target_modules=["down_proj", "q_proj"]))
        randomize(m, "b", 5)
        m.set_adapter(["default", "b"])
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-10, atol=1e-10)
    names = ["default", "__base__", "b", "default"]
    torch.testing.assert_close(
        model(IDS, adapter_names=names), expected(IDS, adapter_names=names), rtol=1e-10, atol=1e-10
    )
    for m in (expected, model):
        m.eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-10, atol=1e-10)


def test_16_bit_layers_get_fp32_parameters_and_answer_in_16_bits(tmp_path):
    model = adapt(offloaded(net(torch.bfloat16), "disk", tmp_path))
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    expected = adapt(net(torch.bfloat16))
    out = model(IDS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected(IDS), rtol=0.03, atol=0.03)


# ---- adapted, then offloaded ----


@ways
@kinds
def test_offloaded_after_adapting_answers_as_before(way, kind, tmp_path):
    model = adapt(net(), kind=kind)
    with torch.no_grad():
        expected = model(IDS)
        deltas = {path: layer.get_delta_weight("default") for path, layer in layers_of(model).items()}
        model = offloaded(model, way, tmp_path)
        assert any(layer.randlora_lambda["default"].is_meta for layer in layers_of(model).values())
        for _ in range(3):
            torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
        model.eval()
        for _ in range(3):
            torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
        for path, layer in layers_of(model).items():
            torch.testing.assert_close(layer.get_delta_weight("default"), deltas[path])
            first, second = layer.get_scaled_bases("default")
            torch.testing.assert_close(second @ first * layer.scaling["default"], deltas[path])


@ways
def test_gradients_of_parameters_that_are_offloaded_are_not_lost_silently(way, tmp_path):
    model = offloaded(adapt(net()), way, tmp_path)
    loss = model(IDS).sum()  # evaluating under autograd is no fault
    with pytest.raises(RuntimeError, match="gradients would be lost: adapt the model after it is"):
        loss.backward()


def test_offloaded_after_adapting_with_frozen_adapters_passes_gradients_on(tmp_path):
    model = adapt(net())
    model.set_adapter("default", inference_mode=True)
    layer = model.model.layers[0].up_proj
    x = torch.randn(3, layer.in_features, dtype=torch.float64)

    def gradient():
        leaf = x.clone().requires_grad_()
        layer(leaf).square().sum().backward()
        return leaf.grad

    expected = gradient()
    offloaded(model, "disk", tmp_path)
    torch.testing.assert_close(gradient(), expected)


def test_hooks_that_are_removed_give_everything_back(tmp_path):
    model = adapt(net())
    expected = model(IDS)
    accelerate.hooks.remove_hook_from_submodules(offloaded(model, "cpu", tmp_path))
    assert not any(p.is_meta for p in model.parameters())
    assert all(layer._base_is_plain() for layer in layers_of(model).values())
    model(IDS).sum().backward()
    torch.testing.assert_close(model(IDS), expected)


def test_changing_the_adapters_of_an_offloaded_model(tmp_path):
    model, expected = offloaded(adapt(net()), "cpu", tmp_path), adapt(net())
    with torch.no_grad():
        for m in (model, expected):
            m.add_weighted_adapter(["default"], [0.5], "less")
            m.set_adapter("less")
        torch.testing.assert_close(model(IDS), expected(IDS))
        for m in (model, expected):
            m.model.layers[0].q_proj.reset_parameters()
            m.set_adapter("default")
        torch.testing.assert_close(model(IDS), expected(IDS))
        for m in (model, expected):
            m.set_adapter("less")
            m.delete_adapter("default")
        accelerate.hooks.remove_hook_from_submodules(model)
        torch.testing.assert_close(model(IDS), expected(IDS))


# ---- files, and looking at a model ----


@ways
@pytest.mark.parametrize("when", ["before", "after"])
def test_saving_and_loading(way, when, tmp_path):
    expected = adapt(net(), modules_to_save=["head"])
    with torch.no_grad():
        expected.model.head.modules_to_save["default"].weight.mul_(1.5)
    expected.save_pretrained(tmp_path / "plain")
    if when == "before":
        model = randlora.RandLoraModel.from_pretrained(offloaded(net(), way, tmp_path / "a"), tmp_path / "plain")
    else:
        model = randlora.RandLoraModel.from_pretrained(net(), tmp_path / "plain")
        model = accelerate.disk_offload(model, str(tmp_path / "a"), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-6, atol=1e-6)
        model.save_pretrained(tmp_path / "again")
        again = randlora.RandLoraModel.from_pretrained(net(), tmp_path / "again")
        torch.testing.assert_close(again(IDS), model(IDS), rtol=1e-12, atol=1e-12)


def test_modules_to_save_are_copied_with_their_numbers_and_train(tmp_path):
    expected = adapt(net(), modules_to_save=["head"])
    model = adapt(offloaded(net(), "cpu", tmp_path), modules_to_save=["head"])
    fresh = model.model.head.modules_to_save["default"]
    assert fresh.weight.requires_grad and torch.equal(fresh.weight, net().head.weight)
    assert torch.equal(fresh.bias, net().head.bias)
    for m in (expected, model):
        m(IDS).square().sum().backward()
    torch.testing.assert_close(fresh.weight.grad, expected.model.head.modules_to_save["default"].weight.grad)
    assert model.model.head.original_module.weight.is_meta


def test_casting(tmp_path):
    model, expected = adapt(offloaded(net(), "cpu", tmp_path)), adapt(net())
    for m in (model, expected):
        m.float()
    out = model(IDS)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected(IDS), rtol=1e-5, atol=1e-5)


def test_explain_and_estimate(tmp_path, capsys):
    model, expected = adapt(offloaded(net(), "cpu", tmp_path), kind="sparse"), adapt(net(), kind="sparse")
    layer, plain = model.model.layers[0].up_proj, expected.model.layers[0].up_proj
    text = randlora.explain(layer, 100)
    assert "float64 on cpu" in text and "sparse" not in text
    plain._base_is_plain = lambda: False  # what is offloaded computes its product itself
    assert text == randlora.explain(plain, 100)
    config = randlora.RandLoraConfig(r=4, target_modules=["q_proj"])
    got, plain = (
        randlora.estimate(m, config, tokens=20, inputs=(IDS,))["methods"]["dense"]
        for m in (offloaded(net(), "cpu", tmp_path / "e"), net())
    )
    for what in ("trainable_parameters", "saved_bytes", "bases_bytes"):
        assert got[what] == plain[what] > 0


def test_a_trial_call_does_not_copy_what_is_offloaded(tmp_path):
    class Once(dict):
        def __deepcopy__(self, memo):
            raise AssertionError("all of the model's weights were copied")

    model = accelerate.cpu_offload(net(), torch.device("cpu"), state_dict=Once(net().state_dict()))
    config = randlora.RandLoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["head"])
    randlora.estimate(model, config, tokens=20, inputs=(IDS,))
    randlora.get_peft_model(model, config)


def test_a_device_map_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    tiny_llama().save_pretrained(tmp_path / "model")
    device_map = {
        "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.norm": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=str(tmp_path / "off")
    )
    settings = {"target_modules": ["q_proj", "down_proj"]}
    assert model.model.layers[1].mlp.down_proj.weight.is_meta
    expected, model = adapt(tiny_llama(), **settings), adapt(model, **settings)
    ids = torch.randint(0, 19, (2, 5))
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        torch.testing.assert_close(model.merge_and_unload()(ids).logits, expected(ids).logits)


# ---- what is refused ----


def test_layers_that_are_brought_in_by_a_parent(tmp_path):
    model = accelerate.cpu_offload(net(), torch.device("cpu"), preload_module_classes=["Block"])
    with pytest.raises(ValueError, match=r"'layers.0.q_proj' cannot be adapted: layers.0 is offloaded with all"):
        adapt(model)
    assert torch.equal(model(IDS), net()(IDS))
    adapted = accelerate.cpu_offload(adapt(net()), torch.device("cpu"), preload_module_classes=["Block"])
    with torch.no_grad():
        torch.testing.assert_close(adapted(IDS), adapt(net())(IDS))


@pytest.mark.parametrize("bias", ["all", "randlora_only"])
def test_biases_that_are_offloaded_are_not_trained(bias, tmp_path):
    model = offloaded(net(), "cpu", tmp_path)
    with pytest.raises(ValueError, match="biases cannot be trained while they are offloaded"):
        adapt(model, bias=bias)
    assert type(model.layers[0].q_proj) is nn.Linear
    adapt(net(), bias=bias).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds the bias .*, which is on the meta device"):
        randlora.RandLoraModel.from_pretrained(model, tmp_path / "adapter")
    assert torch.equal(model(IDS), net()(IDS))


def test_attention(tmp_path):
    encoder = nn.Sequential(nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dropout=0.0)).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    config = {"r": 4, "target_modules": ["self_attn", "linear1"], "init_weights": False}
    with pytest.raises(ValueError, match=r"'0\.self_attn' cannot be adapted while it is offloaded"):
        randlora.get_peft_model(accelerate.cpu_offload(copy.deepcopy(encoder), torch.device("cpu")), config)
    model = randlora.get_peft_model(encoder, config).eval()
    with torch.no_grad():
        expected = model(x)
        accelerate.cpu_offload(model, torch.device("cpu"))
        torch.testing.assert_close(model(x), expected)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        for take in (model.merge_and_unload, model.unload):
            with pytest.raises(ValueError, match="cannot be put together again while it is offloaded"):
                take()
        torch.testing.assert_close(model(x), expected)
        accelerate.hooks.remove_hook_from_submodules(model)
        torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_an_offloaded_parameter_that_is_not_to_be_found(tmp_path):
    model = offloaded(adapt(net()), "cpu", tmp_path)
    layer = model.model.layers[0].q_proj
    layer.randlora_lambda._hf_hook.weights_map = {}
    with pytest.raises(ValueError, match="'default' is offloaded, but where to is not known"):
        model(IDS)


def test_every_hook_counts_where_there_are_several():
    model = Net().double()
    model.load_state_dict(net().state_dict())
    layer = model.layers[0].q_proj
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.ModelHook())
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert type(layer._hf_hook) is accelerate.hooks.SequentialHook
    model, expected = adapt(model), adapt(net())(IDS)
    torch.testing.assert_close(model(IDS), expected)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), expected)
