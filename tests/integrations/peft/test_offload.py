"""PEFT's RandLoRA on layers that accelerate offloads, and on models that are on the meta device."""

import copy
import warnings

import pytest
import torch
from helpers.common import normal
from torch import nn

peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("transformers")

from helpers.peft_models import adapt, config, conv1d, layers, llama, logits, randomize, tokens, version  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402
from randlora.layers import offload  # noqa: E402

CPU = torch.device("cpu")
X = normal(3, 8)
ways = pytest.mark.parametrize("way", ["cpu", "disk", "map"])


def small():
    return layers(wide=(8, 17), tall=(17, 6))


def offloaded(model, way, folder):
    if way == "cpu":
        return accelerate.cpu_offload(model, CPU)
    if way == "disk":
        return accelerate.disk_offload(model, str(folder), CPU)
    prefix = "base_model.model." if isinstance(model, peft.PeftModel) else ""
    places = {prefix + "wide": "cpu", prefix + "tall": "disk"}
    if prefix:
        places |= {"base_model.randlora_A": "cpu", "base_model.randlora_B": "cpu"}
    return accelerate.dispatch_model(model, places, offload_dir=str(folder))


def adapted(model, settings, seed=0):
    """As peft_models.adapt, in place: copies of hooks call the modules that they were copied from."""
    with integration.enable():
        return randomize(peft.get_peft_model(model, copy.deepcopy(settings)), seed)


@ways
@pytest.mark.parametrize("kind", [{}, {"sparse": True}, {"very_sparse": True}])
def test_offloaded_before_adapting_trains_as_any_other(way, kind, tmp_path):
    settings = config("wide", "tall", **kind)
    expected = adapt(small(), settings, accelerated=False)
    model = adapted(offloaded(small(), way, tmp_path), settings)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and not any(p.is_meta for _, p in trained)
    assert not any(buffer.is_meta for buffer in model.buffers())
    for m in (expected, model):
        (m(X) ** 2).sum().backward()
    torch.testing.assert_close(model(X), expected(X), rtol=1e-4, atol=1e-4)
    wanted = dict(expected.named_parameters())
    for name, parameter in trained:
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-3)


@ways
def test_offloaded_after_adapting_answers_as_before(way, tmp_path):
    model = adapt(small(), config("wide", "tall"))
    with torch.no_grad():
        expected = model(X)
        model = offloaded(model, way, tmp_path)
        for training in (True, False):
            model.train(training)
            for _ in range(3):
                torch.testing.assert_close(model(X), expected)
    with pytest.raises(RuntimeError, match="gradients would be lost"):
        model(X).sum().backward()


@ways
@pytest.mark.parametrize("when", ["before", "after"])
def test_merging(way, when, tmp_path):
    settings = config("wide", "tall")
    with torch.no_grad():
        expected, plain = adapt(small(), settings)(X), small()(X)
        if when == "before":
            model = adapted(offloaded(small(), way, tmp_path), settings)
        else:
            model = offloaded(adapt(small(), settings), way, tmp_path)
        model.merge_adapter()
        torch.testing.assert_close(model(X), expected)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(X), plain)
        layer = model.base_model.model.tall
        layer.merge(safe_merge=True)  # without PEFT's own handling of offloaded layers
        torch.testing.assert_close(model(X), expected)
        layer.unmerge()
        with model.disable_adapter():
            assert torch.equal(model(X), plain)
        torch.testing.assert_close(model.merge_and_unload()(X), expected)


def test_merging_leaves_the_weights_that_a_model_is_offloaded_from():
    given = {name: tensor.clone() for name, tensor in small().state_dict().items()}
    before = copy.deepcopy(given)
    model = adapted(accelerate.cpu_offload(small(), CPU, state_dict=given), config("wide", "tall"))
    model.merge_adapter()
    model(X)
    assert all(torch.equal(given[name], before[name]) for name in before)


def test_conv1d_and_a_second_adapter(tmp_path):
    def both(model):
        model = adapted(model, config("layer", fan_in_fan_out=True))
        with integration.enable():
            model.add_adapter("b", config("layer", r=3, fan_in_fan_out=True))
        randomize(model, seed=3).set_adapter("b")
        return model

    model, expected = both(accelerate.cpu_offload(conv1d(8, 5), CPU)), both(conv1d(8, 5))
    assert not any(p.is_meta for name, p in model.named_parameters() if "randlora" in name)
    for adapter in ("b", "default"):
        for m in (model, expected):
            m.set_adapter(adapter)
        torch.testing.assert_close(model(X), expected(X))


def test_a_device_map_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    llama().save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    settings = config("q_proj", "down_proj")
    expected = adapt(llama(), settings)

    def load():
        return transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "off")
        )

    model = adapted(load(), settings)
    torch.testing.assert_close(logits(model), logits(expected))
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "adapter")
    with integration.enable():
        again = peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), logits(expected))


@pytest.mark.skipif(version < (0, 21), reason="earlier versions of PEFT look for lm_head inside of the model")
def test_loading_onto_a_device_map_of_transformers(tmp_path, monkeypatch):
    """PEFT takes the hooks off, loads the adapter, writes the files anew, and offloads all of it once more."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)  # PEFT writes to the model's path without its leading slash
    folder = tmp_path / "models--of--someone" / "model"
    llama().save_pretrained(folder)
    expected = adapt(llama(), config("q_proj", "down_proj"))
    expected.save_pretrained(tmp_path / "adapter")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, device_map=places, offload_folder=str(tmp_path / "a")
    )
    places = {f"base_model.model.{name}": place for name, place in places.items()}
    places |= {"base_model.randlora_A": "cpu", "base_model.randlora_B": "cpu"}
    with integration.enable():
        model = peft.PeftModel.from_pretrained(
            model, tmp_path / "adapter", device_map=places, offload_folder=str(tmp_path / "b")
        )
    assert sum(p.is_meta for name, p in model.named_parameters() if "randlora" in name) == 4
    torch.testing.assert_close(logits(model), logits(expected))
    with pytest.raises(NotImplementedError, match="meta"):  # as for PEFT's LoRA
        model.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again" / "adapter_model.safetensors").exists()
    for layer in model.modules():
        if hasattr(layer, "randlora_lambda"):
            layer.merge()  # PEFT's own merge_and_unload looks for the adapter in the files under another name
    torch.testing.assert_close(logits(model), logits(expected))


# ---- on meta ----


def empty():
    return small().to("meta")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_adapter_has_its_numbers_before_the_weights_come(low_cpu_mem_usage, tmp_path):
    expected = adapt(small(), config("wide", "tall"))
    expected.save_pretrained(tmp_path)
    with integration.enable():
        model = peft.PeftModel.from_pretrained(empty(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert model.base_model.model.wide.base_layer.weight.is_meta
    weights = {k: v for k, v in copy.deepcopy(expected).state_dict().items() if "randlora" not in k}
    model.load_state_dict(weights, strict=False, assign=True)
    torch.testing.assert_close(model(X), expected(X))


def test_a_model_on_meta_computes_shapes_and_its_bases_are_kept():
    model = adapt(empty(), config("wide", "tall"))
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert model(X.to("meta")).shape == (3, 6)
    with pytest.raises(ValueError, match="on the meta device"):
        model.base_model.model.wide(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(adapt(small(), config("wide", "tall")).state_dict(), assign=True)
    torch.testing.assert_close(model(X), adapt(small(), config("wide", "tall"))(X))


@pytest.mark.parametrize("part", ["randlora_lambda", "randlora_gamma"])
def test_parameters_on_meta_name_themselves(part):
    model = adapt(small(), config("wide", "tall"))
    parameters = getattr(model.base_model.model.tall, part)
    parameters["default"] = nn.Parameter(parameters["default"].to("meta"))
    for training in (True, False):
        model.train(training)
        for _ in range(3):
            with (
                torch.set_grad_enabled(training),
                pytest.raises(ValueError, match=rf"{part}\['default'\] is on the meta"),
            ):
                model(X)
    with pytest.raises(ValueError, match="on the meta device"):
        model.base_model.model.tall.merge()
    assert not model.base_model.model.tall.merged


def test_a_weight_on_meta_is_not_merged_into():
    model = adapt(small(), config("wide", "tall"))
    layer = model.base_model.model.tall
    layer.base_layer.weight = nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(ValueError, match="base layer's weight is on the meta device"):
        layer.merge()
    assert not layer.merged


def test_biases_that_are_offloaded_are_not_trained():
    model = accelerate.cpu_offload(small(), CPU)
    for bias in ("all", "randlora_only"):
        with integration.enable(), pytest.raises(ValueError, match="biases cannot be trained while they are offloaded"):
            peft.get_peft_model(model, config("wide", "tall", bias=bias))
        assert type(model.wide) is nn.Linear
    assert torch.equal(model(X), small()(X))


def test_layers_that_are_brought_in_by_a_parent():
    model = nn.Sequential()
    model.add_module("block", small())
    accelerate.cpu_offload(model, CPU, preload_module_classes=["Layers"])
    assert offload.hooks(model.block)
    with integration.enable(), pytest.raises(ValueError, match="block is offloaded with all of its parts at once"):
        peft.get_peft_model(model, config("wide", "tall"))
    assert type(model.block.wide) is nn.Linear


# ---- modules that are saved in full ----


def test_modules_to_save_keep_their_numbers_on_meta(tmp_path):
    settings = config("wide", r=3, modules_to_save=["tall"])
    trained = randomize_saved(adapted(small(), settings))
    trained.save_pretrained(tmp_path)
    with integration.enable():
        model = peft.PeftModel.from_pretrained(small().to("meta"), tmp_path)
    copied, expected = (m.base_model.model.tall.modules_to_save["default"] for m in (model, trained))
    theirs = peft.PeftModel.from_pretrained(small(), tmp_path).base_model.model.tall.modules_to_save["default"]
    assert copied.weight.requires_grad == theirs.weight.requires_grad  # frozen, but for PEFT 0.16
    for name, tensor in expected.state_dict().items():
        assert torch.equal(copied.state_dict()[name], tensor)


@ways
def test_modules_to_save_keep_their_numbers_on_offloaded_models(way, tmp_path):
    """PEFT's copy goes on taking the numbers of the base."""
    settings = config("wide", r=3, modules_to_save=["tall"])
    trained = randomize_saved(adapted(small(), settings))
    trained.save_pretrained(tmp_path / "adapter")
    expected = trained(X)
    base = offloaded(small(), way, tmp_path / "offloaded")
    places = vars(base).pop("hf_device_map", None)  # by which PEFT would offload the adapted model once more
    with integration.enable():
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
        model.load_adapter(tmp_path / "adapter", "second")
        model.set_adapter("second")
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    assert places is None if way != "map" else set(places.values()) == {"cpu", "disk"}
    torch.testing.assert_close(model.merge_and_unload()(X), expected, rtol=1e-4, atol=1e-4)


def test_modules_to_save_are_not_trained_while_they_are_offloaded():
    base = accelerate.cpu_offload(small(), CPU)
    with pytest.raises(ValueError, match="'tall' cannot be trained while it is offloaded"):
        adapted(base, config("wide", r=3, modules_to_save=["tall"]))
    assert not any("randlora" in name for name, _ in base.named_parameters())


def randomize_saved(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.copy_(normal(*parameter.shape, seed=3))
    return model
