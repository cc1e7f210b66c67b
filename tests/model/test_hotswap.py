"""Another adapter's numbers in the place of a loaded one's: the same tensors, the same code, none of it made anew."""

import copy

import pytest
import torch
from helpers.checkpoints import WEIGHTS
from helpers.failing import calls_of, fail_at
from helpers.models import IDS, adapt, add, assert_computes, assert_unchanged, layers_of, net, snapshot
from helpers.swapped import load, places, with_all, written

import randlora

# ---- what is replaced, and what stays --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "hadamard", "sparse"])
def test_the_numbers_of_another_file_in_the_same_tensors(tmp_path, kind):
    other = written(tmp_path / "other", 8, with_all, kind=kind)
    model = add(with_all(1, kind=kind), "b", 2, r=3, target_modules=["q_proj"]).eval()
    before, config, old, b = places(model), copy.deepcopy(model.peft_config), model(IDS), snapshot(model)[0]
    model.hotswap(tmp_path / "other")
    assert places(model) == before and model.peft_config == config and model.active_adapters == ["default"]
    assert torch.equal(model(IDS), other(IDS)) and (model(IDS) - old).abs().max() > 0.05
    assert all(torch.equal(b[name], value) for name, value in model.state_dict().items() if name.endswith(".b"))
    model.save_pretrained(tmp_path / "again", ["default"])
    assert torch.equal(load(tmp_path / "again")(IDS), other(IDS))
    model.set_adapter("b")
    model.hotswap(str(tmp_path / "other"), adapter_name="default")
    with pytest.raises(ValueError, match=r"other cannot take the place of adapter 'b': layers that are not in both"):
        model.hotswap(tmp_path / "other", "b")


def test_a_named_adapter_that_acts_beside_another(tmp_path):
    written(tmp_path, target_modules=["q_proj"])
    model = add(adapt(net()), "b", 2, target_modules=["q_proj"]).eval()
    model.set_adapter(["default", "b"])
    model.hotswap(tmp_path, "b")
    twin = load(tmp_path, net())
    for path, layer in layers_of(model, "b").items():
        assert torch.equal(layer.randlora_lambda["b"], layers_of(twin)[path].randlora_lambda["default"])
    assert_computes(model, ["default", "b"])


@pytest.mark.parametrize("alpha", [6, 0.75, -3, 7.1, 0.3])
def test_another_alpha_goes_into_lambda(tmp_path, alpha):
    """The adapter keeps its own, which compiled code and captured graphs hold as a number."""
    other = written(tmp_path / "other", randlora_alpha=alpha)
    model = adapt(net()).eval()
    model.hotswap(tmp_path / "other")
    exact = alpha in (6, 0.75, -3)  # a power of two times the model's, or its negative
    got, expected = model(IDS), other(IDS)
    torch.testing.assert_close(got, expected, rtol=0, atol=0 if exact else 1e-12)
    assert model.peft_config["default"].randlora_alpha == 3
    assert all(layer.scaling["default"] == 3 / 4 for layer in layers_of(model).values())
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(again(IDS), got) and again.peft_config["default"].randlora_alpha == 3
    assert_computes(model, ["default"])


def test_lambda_is_rounded_once_where_the_scalings_differ(tmp_path):
    other = written(tmp_path, randlora_alpha=7)
    model = adapt(net(torch.float32))
    model.hotswap(tmp_path)
    for path, layer in layers_of(model).items():
        lam = layers_of(other)[path].randlora_lambda["default"].detach()
        assert torch.equal(layer.randlora_lambda["default"], (lam * (7 / 3)).float())


@pytest.mark.parametrize(
    "of_model, of_file", [(0, 3), (3, 0), (1e-300, 1e300), (1e300, 1e-300), (1, 1e200), (1e200, 1)]
)
def test_an_alpha_that_lambda_cannot_make_up_for_is_refused(tmp_path, of_model, of_file):
    written(tmp_path, randlora_alpha=of_file)
    model = adapt(net(torch.float32), randlora_alpha=of_model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"was trained with randlora_alpha=\S+, and adapter 'default' has .* load_ada"):
        model.hotswap(tmp_path)
    assert_unchanged(model, before)


def test_settings_of_training_stay_the_adapters_own(tmp_path):
    """Dropout is no part of what an adapter computes; the inference cache and autograd see that numbers are new."""
    other = written(tmp_path, randlora_dropout=0.5, num_bases=4)
    model = adapt(net(), randlora_dropout=0.25)
    loss = model(IDS).sum()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.hotswap(tmp_path)
    assert all(layer.randlora_dropout["default"].p == 0.25 for layer in layers_of(model).values())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model.eval()
    assert torch.equal(model(IDS), other(IDS))
    model(IDS).sum().backward()
    optimizer.step()
    assert not torch.equal(model(IDS), other(IDS))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_open_inference_cache_notices(tmp_path, mode):
    other, model = written(tmp_path), adapt(net()).eval()
    with mode(), randlora.inference_cache() as scope:
        for _ in range(60):
            model(IDS)
        assert scope.nbytes
        model.hotswap(tmp_path)
        torch.testing.assert_close(model(IDS), other(IDS), rtol=1e-12, atol=1e-12)


# ---- what is refused, and what fails ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"r": 5}, "r must be 4, got 5"),
        ({"bias": "randlora_only"}, "bias must be none, got randlora_only"),
        ({"num_bases": 2}, "num_bases at 'layers.0.q_proj' must be 4, got 2"),
        ({"target_modules": ["q_proj"]}, "layers that are not in both: layers.0.down_proj"),
        ({"modules_to_save": ["head"]}, r"modules_to_save that are not in both: head"),
        ({"projection_prng_key": 7}, "bases must be RandomBases.*got RandomBases"),
        ({"kind": "hadamard"}, "bases must be RandomBases"),
        ({"prng": "peft"}, "bases must be RandomBases"),
    ],
)
def test_another_kind_of_adapter_is_refused_and_nothing_is_changed(tmp_path, changes, message):
    adapt(net(), seed=8, **changes).save_pretrained(tmp_path)
    model = adapt(net())
    before = snapshot(model)
    with pytest.raises(ValueError, match=rf"{tmp_path} cannot take .* 'default': {message}.* with load_adapter\(\)"):
        model.hotswap(tmp_path)
    assert_unchanged(model, before)


def test_names_files_and_merged_adapters(tmp_path):
    written(tmp_path, save_projection=False)
    model = add(adapt(net()), "b", 2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="no adapter named 'c'; it has: default, b"):
        model.hotswap(tmp_path, "c")
    with pytest.raises(ValueError, match="none"):
        model.hotswap(tmp_path / "none")
    weights = tmp_path / WEIGHTS
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{weights} is damaged"):
        model.hotswap(tmp_path)
    assert_unchanged(model, before)
    weights.write_bytes(data)
    model.merge_adapter(["b"])
    merged = snapshot(model)
    with pytest.raises(ValueError, match=r"adapter 'b' is merged.*: call unmerge_adapter\(\) first"):
        model.hotswap(tmp_path, "b")
    with pytest.raises(ValueError, match=r"has merged adapters: call unmerge_adapter\(\) first"):
        model.hotswap(tmp_path)
    assert_unchanged(model, merged)
    model.unmerge_adapter()
    model.hotswap(tmp_path, "b")
    assert_computes(model, ["default"])


def test_biases_that_only_other_adapters_layers_have(tmp_path):
    """They are trained with this adapter, and are in no file of another model's: they would stay as they are."""
    written(tmp_path, 8, with_all)
    model = add(with_all(1, target_modules=["q_proj"]), "b", 2, target_modules=["up_proj"])
    model.set_adapter("default")
    assert model.model.layers[0].up_proj.bias.requires_grad
    written(tmp_path / "q", 8, with_all, target_modules=["q_proj"])
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"q has no layers.0.up_proj.bias, which adapter 'default' trains"):
        model.hotswap(tmp_path / "q")
    assert_unchanged(model, before)


def test_what_fails_in_the_middle_is_undone(tmp_path):
    written(tmp_path, 8, with_all, randlora_alpha=7)
    model = with_all(1)
    total = calls_of(model.hotswap, tmp_path)
    model = with_all(1)
    before, there = snapshot(model), places(model)
    failed = 0
    for k in range(total - 300, total, 17):
        if fail_at(k, model.hotswap, tmp_path) is not None:
            failed += 1
            assert_unchanged(model, before)
            assert places(model) == there
        else:
            model = with_all(1)
            before, there = snapshot(model), places(model)
    assert failed > 10
