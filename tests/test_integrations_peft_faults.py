"""Errors in the middle leave a PEFT model as it was; tied weights, adapters without a tuner, weights in 8 bits."""

import contextlib
import copy
import warnings

import pytest
import torch
from common import normal
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from peft_models import KINDS, adapt, both, config, layers, llama, logits, randomize, tokens, version  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402
from randlora.integrations import _peft_layer, _peft_model  # noqa: E402


def adapted(model):
    return [module for module in model.modules() if hasattr(module, "randlora_lambda")]


def state(model):
    """All that an operation may change, tensors by value and identity of parameters."""
    modules = {name: (type(m), sorted(k for k in vars(m) if k != "_update_cache")) for name, m in model.named_modules()}
    adapters = {
        name: (m.active_adapters, m.merged_adapters[:], sorted(m.bases), m.disable_adapters)
        for name, m in model.named_modules()
        if hasattr(m, "randlora_lambda") and hasattr(m, "bases")
    }
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return modules, adapters, parameters, tied, dict(getattr(model, "peft_config", {})), values


def assert_unchanged(model, before):
    after = state(model)
    for i in (0, 1, 3, 4):
        assert after[i] == before[i]
    assert after[2].keys() == before[2].keys()
    for name, (parameter, flag) in before[2].items():
        assert after[2][name][0] is parameter and after[2][name][1] == flag, name
    assert after[5].keys() == before[5].keys()
    for name, value in before[5].items():
        torch.testing.assert_close(after[5][name], value, rtol=0, atol=0, equal_nan=True)


# ---- adding an adapter ----


class Mixed(nn.Module):
    """What PEFT adapts, with what it refuses in between."""

    def __init__(self):
        super().__init__()
        self.first, self.conv, self.last = nn.Linear(8, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 4)
        self.several = nn.ModuleList([nn.Linear(4, 4)])
        self.untouched = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return self.several[0](self.last(self.first(x)))


FAILING = {
    "unsupported layer": {"target_modules": ["first", "conv", "last"]},
    "no rank": {"target_modules": ["first"], "r": 0},
    "huge rank": {"target_modules": ["first", "last"], "r": 10**30},
    "too large": {"target_modules": ["first", "last"], "r": 10**14},
    "no target": {"target_modules": ["nothing"]},
    "unsupported module to save": {"target_modules": ["first", "last"], "modules_to_save": ["several"]},
}


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject", "inject again"])
@pytest.mark.parametrize("arguments", FAILING.values(), ids=FAILING)
def test_adapters_are_added_whole_or_not_at_all(arguments, how):
    model = Mixed()
    wrong = peft.RandLoraConfig(**{"r": 2, **arguments})
    with integration.enable():
        if how == "add_adapter":
            model = peft.get_peft_model(model, config("first", r=3, modules_to_save=["last"]))
            call = lambda: model.add_adapter("b", wrong)  # noqa: E731
        elif how == "get_peft_model":
            call = lambda: peft.get_peft_model(model, wrong)  # noqa: E731
        else:
            if how == "inject again":
                peft.inject_adapter_in_model(config("first", r=3), model)
            call = lambda: peft.inject_adapter_in_model(wrong, model, "b")  # noqa: E731
        randomize(model)
        before, output = state(model), model(normal(2, 8))
        with pytest.raises((ValueError, TypeError, RuntimeError, OverflowError)):
            call()
    assert_unchanged(model, before)
    assert torch.equal(model(normal(2, 8)), output)
    if how == "add_adapter":  # the name is free
        model.add_adapter("b", config("first", r=2))


@pytest.mark.parametrize("at", ["layer", "wrapper", "bases"])
def test_memory_runs_out(at, monkeypatch):
    """In the middle of what is ours, too."""
    model = adapt(llama(), config("q_proj", r=3))
    before, calls = state(model), []

    def fail_at_the_third(*arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return real(*arguments, **keywords)

    if at == "layer":
        real = _peft_model.convert
        monkeypatch.setattr(_peft_model, "convert", fail_at_the_third)
    elif at == "wrapper":
        real = copy.deepcopy
        monkeypatch.setattr("peft.utils.other.copy.deepcopy", fail_at_the_third)
    else:
        real, calls = _peft_model.disable_fast_path, [1, 2]
        monkeypatch.setattr(_peft_model, "disable_fast_path", fail_at_the_third)
    with pytest.raises(MemoryError):
        saved = ["embed_tokens", "lm_head", "norm"]
        model.add_adapter("b", config("q_proj", "v_proj", "k_proj", r=2, modules_to_save=saved))
    monkeypatch.undo()
    assert_unchanged(model, before)
    model.add_adapter("b", config("q_proj", "v_proj", r=2, modules_to_save=["embed_tokens", "lm_head"]))


def test_accelerate_is_undone(monkeypatch):
    model = adapt(llama(torch.bfloat16), config("q_proj", "v_proj"), False)
    before, real, calls = state(model), _peft_model.convert, []

    def fail_at_the_third(layer):
        calls.append(layer)
        if len(calls) == 3:
            raise MemoryError
        return real(layer)

    monkeypatch.setattr(_peft_model, "convert", fail_at_the_third)
    with pytest.raises(MemoryError):
        integration.accelerate(model)
    assert_unchanged(model, before)
    assert type(model.base_model) is peft.RandLoraModel and len(calls) == 3
    logits(model)
    monkeypatch.undo()
    assert type(integration.accelerate(model).base_model) is _peft_model.RandLoraModel


def test_a_second_adapter_without_targets_is_refused_as_by_peft():
    found = []
    for model in both(llama(), config("q_proj")):
        with pytest.raises(ValueError) as error:
            model.add_adapter("b", config("nothing"))
        found.append((error.type, str(error.value)))
        assert list(model.peft_config) == ["default"]
    assert found[0] == found[1]


# ---- merging ----


def broken(model, which=-1):
    with torch.no_grad():
        adapted(model)[which].randlora_lambda["default"][0, 0] = torch.nan
    return model


@pytest.mark.parametrize("already", [False, True])
@pytest.mark.parametrize("how", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_safe_merge_changes_all_layers_or_none(dtype, how, already):
    model = adapt(llama(dtype), config("q_proj", "v_proj", "lm_head", r=3))
    model.add_adapter("b", config("q_proj", "up_proj", r=2))
    randomize(model, seed=3)
    if already:
        model.merge_adapter(["b"])
    broken(model)
    before = state(model)
    with pytest.raises(ValueError, match="nothing was changed"):
        getattr(model, how)(safe_merge=True)
    assert_unchanged(model, before)
    assert all(layer._unmerged_weight is None for layer in adapted(model) if not layer.merged)
    assert sum(layer.merged for layer in adapted(model)) == (4 if already else 0)
    model.unmerge_adapter()
    assert torch.equal(adapted(model)[0].base_layer.weight, llama(dtype).model.layers[0].self_attn.q_proj.weight)
    merged = model.merge_and_unload(adapter_names=["b"], safe_merge=True)
    assert not adapted(merged) and torch.isfinite(logits(merged)).all()


def test_memory_runs_out_in_merging(monkeypatch):
    model = adapt(llama(), config("q_proj", "v_proj", r=3))
    before, calls, real = state(model), [], _peft_layer.Linear.get_delta_weight

    def fail_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(_peft_layer.Linear, "get_delta_weight", fail_at_the_third)
    with pytest.raises(MemoryError):
        model.merge_adapter()
    assert_unchanged(model, before)


# ---- tied weights ----


def tied_llama():
    settings = llama().config
    settings.tie_word_embeddings = True
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(settings)


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


# ---- adapters without a tuner ----


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
    from peft.functional import delete_adapter

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


# ---- the rest of PEFT's surface ----


@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized", "merged"])
@pytest.mark.parametrize("kind", KINDS)
def test_trainable_base_weights(kind, strategy):
    """FSDP makes them so."""
    theirs, ours = both(llama(), config("q_proj", "down_proj", **KINDS[kind]))
    for layer in adapted(ours):
        layer.strategy = strategy
    for model in (theirs, ours):
        model.requires_grad_(True)
        model(input_ids=tokens()).logits.square().sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-3 * a.grad.abs().max().item(), msg=name)
    with torch.no_grad():
        assert_close(logits(ours.eval()), logits(theirs.eval()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wrong", ["merged", "unknown"])
def test_deleting_is_refused_in_pefts_words(wrong):
    found = []
    for model in both(llama(), config("q_proj")):
        model.add_adapter("b", config("v_proj"))
        model.merge_adapter(["b"])
        with pytest.raises(ValueError) as error:
            model.delete_adapter("b" if wrong == "merged" else "c")
        found.append((error.type, str(error.value)))
        model.unmerge_adapter()
        model.delete_adapter("b")
    if version >= (0, 21):
        assert found[0] == found[1]


@pytest.mark.parametrize("how", ["disable_adapter", "layers", "modules"])
def test_frozen_adapters_stay_frozen(how):
    model = adapt(llama(), config("q_proj", modules_to_save=["lm_head"], inference_mode=True))
    model.add_adapter("b", config("v_proj", modules_to_save=["lm_head"]))
    if version >= (0, 18):
        model.set_requires_grad("b", True)

    def trained():
        return [name for name, parameter in model.named_parameters() if parameter.requires_grad]

    before = trained()
    if how == "disable_adapter":
        with model.disable_adapter():
            assert trained() == []
    elif how == "layers":
        model.base_model.disable_adapter_layers()
        model.base_model.disable_adapter_layers()
        copied = copy.deepcopy(model)
        copied.base_model.enable_adapter_layers()
        assert [name for name, parameter in copied.named_parameters() if parameter.requires_grad] == before
        model.base_model.enable_adapter_layers()
    else:  # as transformers does it, where there is no tuner
        before = [name for name in before if "lm_head" not in name]
        for layer in adapted(model):
            layer.enable_adapters(False)
            layer.enable_adapters(True)
        assert [name for name in trained() if "lm_head" not in name] == before
        return
    assert trained() == before
    with model.disable_adapter():
        model.set_adapter("b")
    assert {name.split(".")[-1] for name in trained() if "randlora_" in name} == {"b"}


@pytest.mark.parametrize("saved", [(1, 1, 0), (1, 0, 1), (0, 1, 0), (0, 1, 1), (0, 0, 1)], ids=str)
def test_deleting_the_active_adapter_with_modules_to_save(saved):
    """The next one acts with its own copy, where it has one."""

    def settings(flag):
        return config("q_proj", modules_to_save=["lm_head"] if flag else None)

    model = adapt(llama(), settings(saved[0]))
    for name, flag in zip(("b", "c"), saved[1:], strict=True):
        model.add_adapter(name, settings(flag))
    randomize(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.mul_(1 + len(name))
    for name in ("b", "c"):
        model.set_adapter(name)
        expected = logits(model)
        model.set_adapter("default" if name == "b" else "b")
        model.delete_adapter("default" if name == "b" else "b")
        assert model.active_adapters == [name]
        assert_close(logits(model), expected)
        for layer in adapted(model):
            assert set(layer.bases) == set(layer.randlora_lambda) == set(model.peft_config)
