"""Adapters without a tuner, as transformers' and diffusers' ``add_adapter`` make them, and weights in 8 bits."""

import contextlib
import copy

import pytest
import torch
from helpers.common import normal

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from helpers.peft_models import (  # noqa: E402
    KINDS,
    adapt,
    adapted,
    config,
    layers,
    llama,
    logits,
    randomize,
    version,
)
from torch.testing import assert_close  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402
from randlora.integrations.peft import layer as peft_layer  # noqa: E402


def injected(*configs, accelerated=(True, True, True), names=("first", "second", "third")):
    model = llama()
    for one, name, enabled in zip(configs, names, accelerated, strict=False):
        with integration.enable() if enabled else contextlib.nullcontext():
            peft.inject_adapter_in_model(copy.deepcopy(one), model, name)
    return model


def activate(model, name):
    for layer in adapted(model):
        layer.set_adapter(name)


SETTINGS = {
    "first": config("q_proj", "v_proj", r=3),
    "second": config("q_proj", "up_proj", r=4, sparse=True),
    "third": config("q_proj", r=5, save_projection=False),
}
ENABLED = {"always": (True, True, True), "late": (False, True, True), "early": (True, True, False)}


@pytest.mark.parametrize("when", ENABLED)
def test_injected_one_after_the_other(when):
    """transformers' and diffusers' ``add_adapter``. In PEFT the first one's bases are gone."""
    settings = copy.deepcopy(SETTINGS)
    if when == "early":  # PEFT's own tuner wants them to agree
        settings["third"].save_projection = True
    model = injected(*settings.values(), accelerated=ENABLED[when])
    for name in settings:
        single = randomize(injected(settings[name], names=[name]))
        with torch.no_grad():
            for key, parameter in single.named_parameters():
                if "randlora_" in key:
                    model.get_parameter(key).copy_(parameter)
        activate(model, name)
        assert_close(logits(model), logits(single), rtol=1e-4, atol=1e-4)
    assert list(model.peft_config) == list(SETTINGS)


def test_injected_adapters_are_saved_and_deleted():
    delete_adapter = pytest.importorskip("peft.functional").delete_adapter
    model = randomize(injected(*SETTINGS.values()))
    keys = list(model.state_dict())
    for name in ("first", "second"):
        assert sum(key.endswith(f"randlora_A.{name}") for key in keys) == 1
    assert not any(key.endswith("randlora_A.third") for key in keys)
    other = injected(*SETTINGS.values())
    other.load_state_dict(model.state_dict())
    for name in SETTINGS:
        activate(model, name), activate(other, name)
        assert torch.equal(logits(model), logits(other))
    state_dict = peft.get_peft_model_state_dict(model, adapter_name="second")
    peft.set_peft_model_state_dict(single := injected(SETTINGS["second"], names=["second"]), state_dict, "second")
    activate(model, "second")
    expected = logits(model)
    assert torch.equal(logits(single), expected)
    delete_adapter(model, "first", "randlora_")
    activate(model, "second")
    assert torch.equal(logits(model), expected)
    for layer in adapted(model):
        assert set(layer.bases) == set(layer.randlora_lambda) == set(layer.num_bases) and "first" not in layer.bases
        assert set(layer.randlora_A) == {"second", "third"}
    with integration.enable():
        peft.inject_adapter_in_model(config("v_proj", r=2), model, "first")
    activate(model, "second")
    assert torch.equal(logits(model), expected)


def test_injected_twice_under_one_name():
    """Onto other layers: each keeps its own bases, in files too."""
    one, two = config("q_proj", r=3), config("v_proj", r=4)
    model = randomize(injected(one, two, names=["default"] * 2))
    q, v = (randomize(injected(c, names=["default"])) for c in (one, two))
    for layer, single in zip(adapted(model)[::2], adapted(q), strict=True):
        assert torch.equal(layer.randlora_A["default"], single.randlora_A["default"])
    for layer, single in zip(adapted(model)[1::2], adapted(v), strict=True):
        assert torch.equal(layer.randlora_A["default"], single.randlora_A["default"])
    for layer in adapted(model):
        for store in (layer.randlora_A, layer.randlora_B):
            store["default"] = store["default"] * 1.25
    again = injected(one, two, names=["default"] * 2)
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), logits(model))


def test_bases_of_an_injected_adapter_are_saved_where_it_is():
    """Not in the model's first adapted layer, where the file's reader may find no layer of this adapter."""
    settings = [config("q_proj", r=3), config("v_proj", r=4)]
    model = randomize(injected(*settings, names=["first", "second"]))
    for store in (adapted(model)[0].randlora_A, adapted(model)[0].randlora_B):
        store["second"] = store["second"] * 1.25  # not those that are drawn anew
    activate(model, "second")
    again = injected(*settings, names=["first", "second"])
    again.load_state_dict(model.state_dict())
    single = injected(settings[1], names=["second"])
    state_dict = peft.get_peft_model_state_dict(model, adapter_name="second")
    unexpected = peft.set_peft_model_state_dict(single, state_dict, "second").unexpected_keys
    assert [key for key in unexpected if not key.endswith(".first")] == []  # PEFT 0.16 hands out all adapters' weights
    for other in (again, single):
        activate(other, "second")
        assert torch.equal(logits(other), logits(model))


def test_injected_beside_a_tuner():
    """The tuner that is there goes on owning the bases."""
    model = adapt(llama(), SETTINGS["first"])
    expected = logits(model)
    with integration.enable():
        peft.inject_adapter_in_model(copy.deepcopy(SETTINGS["second"]), model.base_model.model, "second")
    assert sum("randlora_A.second" in key for key in model.state_dict()) == 1
    activate(model, "second")
    assert torch.equal(logits(model), logits(llama()))  # it is new
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


# ---- weights that are kept in 8 bits between calls ----


def test_adapters_in_8_bits_are_not_converted():
    """PEFT leaves them so where it is told not to cast adapters, and cannot compute with them."""
    model = layers(a=(8, 6))
    cast_for_each_call(model.a)
    model = peft.get_peft_model(model, config("a", r=2), autocast_adapter_dtype=False)
    with pytest.raises(ValueError, match=r"'a' has adapter 'default' in torch\.float8_e4m3fn"):
        integration.accelerate(model.base_model.model)
    assert type(model.base_model.model.a) is not peft_layer.AcceleratedLinear


def cast_for_each_call(module, storage=torch.float8_e4m3fn, by="hooks"):
    """As diffusers' ``apply_layerwise_casting`` does it: in place of the module's forward."""
    original = module.forward
    if by == "hooks":
        module.register_forward_pre_hook(lambda module, args: module.to(torch.float32) and None)
        module.register_forward_hook(lambda module, args, result: module.to(storage) and None)
    else:

        def forward(*args, **kwargs):
            module.to(torch.float32)
            try:
                return original(*args, **kwargs)
            finally:
                module.to(storage)

        module.forward = forward
    return module.to(storage)


@pytest.mark.skipif(version < (0, 21), reason="earlier versions of PEFT cannot compute with such weights")
@pytest.mark.filterwarnings("ignore:merging into float8")
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("by", ["hooks", "forward"])
@pytest.mark.parametrize("kind", KINDS)
def test_layerwise_casting(kind, by, storage):
    base = layers(a=(8, 600), b=(600, 8), c=(8, 8))
    found = []
    for accelerated in (False, True):
        model = copy.deepcopy(base)
        for name in "ab":
            cast_for_each_call(getattr(model, name), storage, by)
        with integration.enable() if accelerated else contextlib.nullcontext():
            model = peft.get_peft_model(model, config("a", "b", "c", r=2, **KINDS[kind]))
        found.append(model)
    theirs, ours = found
    assert {p.dtype for n, p in ours.named_parameters() if "randlora_" in n} == {torch.float32}
    assert [(n, p.dtype) for n, p in theirs.named_parameters()] == [(n, p.dtype) for n, p in ours.named_parameters()]
    for which in ("randlora_A", "randlora_B"):
        a, b = (getattr(m.base_model, which)["default"] for m in found)
        assert torch.equal(a.float(), b.float())
    gamma = ours.base_model.model.a.randlora_gamma["default"]
    assert torch.equal(gamma, torch.full_like(gamma, 1 / max(gamma.shape)))  # not rounded to 8 bits
    x = normal(5, 8)
    for model in found:
        randomize(model)(x).square().sum().backward()
    assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        if a.requires_grad:
            assert_close(b.grad, a.grad, rtol=1e-2, atol=1e-2 * a.grad.abs().max().item(), msg=name)
    weight, expected = ours.base_model.model.a.weight, ours(x)
    before = weight.detach().clone().view(torch.uint8)
    ours.merge_adapter()
    assert ours.base_model.model.a.weight.dtype == storage
    assert (ours(x) - expected).norm() < 0.2 * expected.norm()
    ours.unmerge_adapter()
    assert ours.base_model.model.a.weight is weight and torch.equal(weight.view(torch.uint8), before)
    ours.add_adapter("second", config("a", "b", r=3, **KINDS[kind]))
    gamma = ours.base_model.model.a.randlora_gamma["second"]
    assert gamma.dtype == torch.float32 and torch.equal(gamma, torch.full_like(gamma, 1 / max(gamma.shape)))
    assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


def test_layerwise_casting_of_adapted_layers():
    """Cast after adapting, an adapter is stored in 8 bits too, as in PEFT; its bases are not."""
    model = randomize(peft_injected := injected(SETTINGS["first"], names=["default"]))
    exact = logits(model)
    for layer in adapted(model):
        cast_for_each_call(layer, by="forward")
    assert {layer.base_layer.weight.dtype for layer in adapted(model)} == {torch.float8_e4m3fn}
    assert all(layer.randlora_A["default"].dtype.itemsize > 1 for layer in adapted(model))
    assert (logits(peft_injected) - exact).norm() < 0.2 * exact.norm()


def test_layerwise_casting_without_peft():
    base = layers(a=(8, 600), b=(600, 8))
    plain = copy.deepcopy(base)
    for layer in (base.a, base.b):
        cast_for_each_call(layer)
        with torch.no_grad():
            plain.get_submodule("a" if layer is base.a else "b").load_state_dict(layer.state_dict())
    model, other = (
        randlora.get_peft_model(m, randlora.RandLoraConfig(r=2, target_modules=["a", "b"])) for m in (base, plain)
    )
    x = normal(5, 8)
    for one in (model, other):
        randomize(one)(x).square().sum().backward()
    assert {p.dtype for n, p in model.named_parameters() if "randlora_" in n} == {torch.float32}
    assert_close(model(x), other(x), rtol=1e-4, atol=1e-4)
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if p.requires_grad:
            assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=name)
