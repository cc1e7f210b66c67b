"""Models on the meta device, which have shapes and no numbers: what computes there, what is kept, what is refused."""

import copy

import pytest
import torch
from helpers.common import KINDS, make_base, make_layer, normal, over
from helpers.models import IDS, Net, adapt, layers_of, net
from torch import nn

import randlora

STRATEGIES = ("auto", "factored", "materialized", "merged")


def empty(dtype=torch.float64):
    with torch.device("meta"):
        return Net().to(dtype)


def on_meta(layer, name="default", part="randlora_lambda"):
    parameters = getattr(layer, part)
    parameters[name] = nn.Parameter(parameters[name].to("meta"))
    return layer


def saved(tmp_path, **settings):
    adapted = adapt(net(), **settings)
    for module in adapted.modules():
        if getattr(module, "is_modules_to_save", False):
            with torch.no_grad():
                module.modules_to_save["default"].weight.mul_(1.5)
    adapted.save_pretrained(tmp_path)
    return adapted


# ---- mixed with real tensors ----


@pytest.mark.parametrize("part", ["randlora_lambda", "randlora_gamma"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(41, 24), (24, 41)])
def test_parameters_on_meta_name_themselves(part, strategy, kind, sizes):
    bases = randlora.RandomBases(41, 24, 5, kind)
    layer = on_meta(make_layer(*sizes, bases=bases, strategy=strategy), part=part)
    x = normal(3, sizes[0])
    for training in (True, False):
        for grad in (True, False):
            layer.train(training)
            for _ in range(3):
                with (
                    torch.set_grad_enabled(grad),
                    pytest.raises(ValueError, match=rf"{part}\['default'\] is on the meta"),
                ):
                    layer(x)
    with pytest.raises(ValueError, match="on the meta device"):
        layer.merge()
    assert not layer.merged


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_weight_on_meta_is_not_computed_with(strategy):
    layer = make_layer(strategy=strategy)
    layer.base_layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    for training in (True, False):
        layer.train(training)
        for _ in range(3):
            with (
                torch.set_grad_enabled(training),
                pytest.raises(ValueError, match="base layer's weight is on the meta"),
            ):
                layer(normal(3, 41))
    for safe in (True, False):
        with pytest.raises(ValueError, match="base layer's weight is on the meta device: it has no numbers to merge"):
            layer.merge(safe_merge=safe)
    assert not layer.merged


def test_a_bias_on_meta_is_not_computed_with():
    layer = make_layer()
    layer.base_layer.bias = nn.Parameter(layer.bias.to("meta"), requires_grad=False)
    for training in (True, False):
        layer.train(training)
        for _ in range(3):
            with torch.set_grad_enabled(training), pytest.raises(ValueError, match="base layer's bias is on the meta"):
                layer(normal(3, 41))


def test_what_a_base_layer_returns_on_meta_is_not_added_to():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x).to("meta")

    layer = randlora.Linear(Own(7, 5), r=2)
    with pytest.raises(ValueError, match="Own, returns is on the meta device"):
        layer(normal(3, 7))


@pytest.mark.parametrize("strategy", STRATEGIES)
@over("dtype", (torch.float32, torch.bfloat16))
def test_shapes_are_computed_whatever_has_numbers(strategy, dtype):
    x = torch.empty(2, 3, 41, device="meta", dtype=dtype)
    layer = randlora.Linear(make_base(41, 24, dtype=dtype).to("meta"), r=5, strategy=strategy)
    assert all(p.is_meta for p in layer.parameters())
    for training in (True, False):
        layer.train(training)
        for loaded in (False, True):
            if loaded:  # as from_pretrained leaves it
                layer.randlora_lambda["default"] = nn.Parameter(torch.randn(5, 5))
            with torch.set_grad_enabled(training):
                y = layer(x)
            assert y.is_meta and y.shape == (2, 3, 24) and y.dtype == dtype
    assert randlora.Linear(make_base(4, 3).to("meta"), r=2).get_delta_weight("default").is_meta


# ---- a model whose weights come later ----


@pytest.mark.parametrize("trainable", [True, False])
def test_a_loaded_adapter_has_its_numbers_before_the_weights_come(trainable, tmp_path):
    expected = saved(tmp_path, modules_to_save=["head"])
    model = randlora.RandLoraModel.from_pretrained(empty(), tmp_path, is_trainable=trainable)
    for path, layer in layers_of(expected).items():
        mine = layers_of(model)[path]
        assert mine.base_layer.weight.is_meta
        for part in ("randlora_lambda", "randlora_gamma"):
            parameter = getattr(mine, part)["default"]
            assert parameter.dtype == torch.float64 and parameter.requires_grad == trainable
            assert torch.equal(parameter.float(), getattr(layer, part)["default"].float())
    layer = layers_of(model)["layers.0.up_proj"]
    assert layer(torch.empty(2, 13, dtype=torch.float64, device="meta")).shape == (2, 22)  # nothing is lost by it
    weights = copy.deepcopy(expected).state_dict()
    weights = {k: v for k, v in weights.items() if "randlora" not in k and "modules_to_save" not in k}
    model.load_state_dict(weights, strict=False, assign=True)
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-6, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-6, atol=1e-6)


def test_the_numbers_are_apart_from_the_file(tmp_path):
    saved(tmp_path)
    model = randlora.RandLoraModel.from_pretrained(empty(), tmp_path, is_trainable=True)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            if not p.is_meta:
                p.add_(1)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_to_empty_keeps_adapters_that_have_numbers(tmp_path):
    expected = saved(tmp_path, modules_to_save=["head"])
    model = randlora.RandLoraModel.from_pretrained(empty(), tmp_path)
    assert model.to_empty(device="cpu") is model
    assert not any(p.is_meta for p in model.parameters())
    model.model.load_state_dict({k: v for k, v in expected.model.state_dict().items() if "randlora" not in k
                                 and "modules_to_save" not in k}, strict=False)  # fmt: skip
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-6, atol=1e-6)


def test_to_empty_of_an_adapter_in_memory():
    model = adapt(net())
    held = {name: p.clone() for name, p in model.named_parameters() if "randlora" in name}
    model.to_empty(device="cpu")
    assert held and all(torch.equal(dict(model.named_parameters())[name], p) for name, p in held.items())


def test_torchs_way_to_fill_a_model():
    model = adapt(empty())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(float("nan"))
    model.apply(lambda module: module.reset_parameters() if hasattr(module, "reset_parameters") else None)
    assert torch.isfinite(model(IDS)).all()
    for layer in layers_of(model).values():
        assert not layer.randlora_lambda["default"].any()
        assert (layer.randlora_gamma["default"] == 1 / max(layer.randlora_gamma["default"].shape)).all()


def test_resetting_a_layer_leaves_its_base_layer():
    layer = make_layer()
    weight = layer.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight, weight) and not layer.get_delta_weight("default").any()


def test_accelerates_empty_models(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    expected = saved(tmp_path / "adapter", modules_to_save=["head"])
    with accelerate.init_empty_weights():
        model = Net().double()
    model = randlora.RandLoraModel.from_pretrained(model, tmp_path / "adapter")
    with accelerate.init_empty_weights():
        inside = randlora.RandLoraModel.from_pretrained(Net().double(), tmp_path / "adapter")
    for loaded in (model, inside):
        weights = {
            k.removeprefix("model."): v
            for k, v in expected.state_dict().items()
            if "randlora" not in k and "modules_to_save" not in k
        }
        torch.save(weights, tmp_path / "weights.bin")
        accelerate.load_checkpoint_in_model(loaded.model, str(tmp_path / "weights.bin"), device_map={"": "cpu"})
        torch.testing.assert_close(loaded(IDS), expected(IDS), rtol=1e-6, atol=1e-6)


def test_a_second_adapter_is_loaded_onto_a_model_on_meta(tmp_path):
    expected = saved(tmp_path)
    model = randlora.get_peft_model(empty(), randlora.RandLoraConfig(r=3, target_modules=["q_proj"]))
    model.load_adapter(tmp_path, "b")
    for path, layer in layers_of(expected).items():
        got = layers_of(model)[path].randlora_gamma["b"]
        assert torch.equal(got.float(), layer.randlora_gamma["default"].float())


def test_trained_biases_wait_for_the_weights(tmp_path):
    saved(tmp_path, bias="randlora_only")
    model = empty()
    with pytest.raises(ValueError, match=r"holds the bias .*, which is on the meta device in this model"):
        randlora.RandLoraModel.from_pretrained(model, tmp_path)
    assert type(model.layers[0].q_proj) is nn.Linear


# ---- saving and merging what is not there ----


@pytest.mark.parametrize("what", ["randlora_lambda", "randlora_gamma", "head", "bias"])
def test_what_is_on_meta_is_not_saved(what, tmp_path):
    model = adapt(net(), modules_to_save=["head"], bias="randlora_only")
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    layer = model.model.layers[1].up_proj
    if what == "head":
        model.model.head.modules_to_save.to("meta")
    elif what == "bias":
        layer.base_layer.bias = nn.Parameter(layer.bias.to("meta"))
    else:
        on_meta(layer, part=what)
    with pytest.raises(ValueError, match=rf".*{what}.* is on the meta device: it has no numbers to save"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="no numbers to save"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("what", ["weight", "randlora_lambda", "randlora_gamma"])
def test_merging_changes_nothing_where_one_layer_has_no_numbers(call, what):
    model = adapt(net())
    expected = model(IDS)
    layer = model.model.layers[1].down_proj
    kept = copy.deepcopy(layer)
    if what == "weight":
        layer.base_layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    else:
        on_meta(layer, part=what)
    with pytest.raises(ValueError, match=r"'layers\.1\.down_proj' cannot be merged into: .* on the meta device"):
        getattr(model, call)()
    model.model.layers[1].down_proj = kept
    assert not any(layer.merged for layer in layers_of(model).values())
    assert torch.equal(model(IDS), expected)


def test_unloading_a_model_on_meta():
    model = adapt(empty())
    with pytest.raises(ValueError, match="on the meta device"):
        model.merge_and_unload()
    plain = model.unload()
    assert not any(isinstance(module, randlora.Linear) for module in plain.modules())
    assert plain(IDS.to("meta")).shape == (4, 5, 7)


def test_attention_on_meta():
    attention = nn.MultiheadAttention(12, 2, batch_first=True, device="meta")
    model = randlora.MultiheadAttention(attention, r=4)
    x = torch.empty(2, 5, 12, device="meta")
    assert model(x, x, x)[0].is_meta and all(p.is_meta for p in model.parameters())
    assert model.unwrap().in_proj_weight.is_meta
    x = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match="on the meta device"):
        model(x, x, x)


# ---- bases ----


@pytest.mark.parametrize("kind", KINDS)
def test_bases_on_meta_are_made_where_they_are_needed(kind):
    bases, real = (randlora.RandomBases(41, 24, 5, kind, device=device) for device in ("meta", "cpu"))
    assert bases.fingerprint() == real.fingerprint()
    x = normal(3, 41)
    assert torch.equal(make_layer(bases=bases)(x), make_layer(bases=real)(x))
    assert bases.A.is_meta


def test_bases_given_on_meta_have_no_numbers():
    A, B = torch.empty(5, 1, 24, device="meta"), torch.empty(41, 5, 5, device="meta")
    layer = make_layer(randlora_A=A, randlora_B=B)
    for call in (lambda: layer(normal(3, 41)), layer.merge, layer.bases["default"].fingerprint):
        with pytest.raises(ValueError, match="these bases were given on the meta device"):
            call()
    assert not layer.merged


def test_an_adapter_on_meta_gets_numbers_by_torchs_own_means():
    layer = randlora.Linear(make_base(41, 24).to("meta"), r=5)
    layer.base_layer.to_empty(device="cpu").reset_parameters()
    with pytest.raises(ValueError, match=r"randlora_lambda\['default'\] is on the meta device"):
        layer(normal(3, 41))
    layer.to_empty(device="cpu").reset_parameters()
    layer.base_layer.reset_parameters()
    torch.testing.assert_close(layer(normal(3, 41)), layer.base_layer(normal(3, 41)))
