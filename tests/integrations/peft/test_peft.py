"""Switching randlora on and off in PEFT, and PEFT's scripts while it is on."""

import contextlib
import copy
import importlib
import io
import sys

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.peft_models import (  # noqa: E402
    KINDS,
    adapt,
    both,
    config,
    layers,
    llama,
    logits,
    randomize,
    state_of_peft,
    tokens,
    version,
)
from peft.tuners import randlora as peft_randlora  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402
from randlora.integrations.peft import layer as peft_layer  # noqa: E402
from randlora.integrations.peft import model as peft_model  # noqa: E402
from randlora.layers import update_cache  # noqa: E402

CONFIG = config("q_proj", "v_proj", "down_proj")


def test_disable_gives_everything_back():
    before = state_of_peft()
    integration.enable()
    assert state_of_peft() != before and peft.RandLoraModel is peft_model.AcceleratedRandLoraModel
    integration.enable()
    integration.disable()
    assert state_of_peft() == before
    integration.disable()
    assert state_of_peft() == before


def test_contexts_nest():
    before = state_of_peft()
    with integration.enable(prng="peft-fp16"):
        enabled = state_of_peft()
        with integration.enable():
            assert peft_model.AcceleratedRandLoraModel.half == torch.bfloat16
        assert state_of_peft() == enabled and peft_model.AcceleratedRandLoraModel.half == torch.float16
        with pytest.raises(KeyError), integration.enable():
            raise KeyError
    assert state_of_peft() == before
    with pytest.raises(ValueError, match="'philox'"):
        integration.enable(prng="philox")
    assert state_of_peft() == before


def test_without_peft(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    importlib.reload(integration)
    for call in (integration.enable, lambda: integration.accelerate(torch.nn.Linear(2, 2))):
        with pytest.raises(ImportError, match="pip install peft"):
            call()


@pytest.mark.parametrize(
    "arguments",
    [
        {"r": 32, "randlora_alpha": 64, "target_modules": ["q_proj", "v_proj"], "projection_prng_key": 42},
        {"r": 64, "randlora_alpha": 128, "target_modules": ["q_proj", "k_proj", "v_proj"], "sparse": True},
        {"r": 64, "target_modules": ["q_proj", "v_proj"], "very_sparse": True, "save_projection": False},
    ],
    ids=["basic", "sparse", "very_sparse"],
)
def test_usage_examples(arguments, capsys):
    """PEFT's own three examples, on a small Llama: with PEFT's import, plain and accelerated, and with randlora's."""
    outputs, printed = [], []
    for accelerated in (False, True):
        with integration.enable() if accelerated else torch.no_grad():
            model = llama()
            config = peft.RandLoraConfig(**arguments)
            model = peft.get_peft_model(model, config)
            model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
        outputs.append(logits(randomize(model)))
        q_proj = model.base_model.model.model.layers[0].self_attn.q_proj
        assert isinstance(q_proj, peft_layer.AcceleratedLinear) == accelerated
    torch.testing.assert_close(*outputs)
    model = randlora.get_peft_model(llama(), randlora.RandLoraConfig(**arguments))
    model.print_trainable_parameters()
    printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] == printed[2] and printed[0].startswith("trainable params")


def test_classes_are_still_pefts():
    model = adapt(llama(), CONFIG)
    found = [m for m in model.modules() if isinstance(m, peft_randlora.RandLoraLayer)]
    assert len(found) == 6 and all(isinstance(m, (peft_randlora.Linear, torch.nn.Linear)) for m in found)
    assert isinstance(model, peft.PeftModel)
    assert isinstance(model.base_model, peft.RandLoraModel)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in adapt(llama(), CONFIG, False).named_parameters()]
    assert [type(m).__name__ for m in (model.base_model, found[0])] == ["RandLoraModel", "Linear"]
    assert "(base_model): RandLoraModel(" in repr(model)
    assert "randlora_lambda" in repr(model) and repr(found[0]).startswith("randlora.Linear(")


def test_pickles_and_copies_are_of_the_same_classes(tmp_path):
    model = adapt(llama(), CONFIG)
    torch.save(model, tmp_path / "model.pt")
    for again in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert [type(m) for m in again.modules()] == [type(m) for m in model.modules()]
        torch.testing.assert_close(logits(again), logits(model))


@pytest.mark.parametrize("how", ["get_peft_model", "tuner", "inject"])
def test_every_way_to_build(how):
    with integration.enable():
        if how == "get_peft_model":
            model = peft.get_peft_model(llama(), CONFIG).base_model.model
        elif how == "tuner":
            model = peft.RandLoraModel(llama(), copy.deepcopy(CONFIG), "default").model
        else:
            model = peft.inject_adapter_in_model(copy.deepcopy(CONFIG), llama())
    assert sum(type(m) is peft_layer.AcceleratedLinear for m in model.modules()) == 6


def test_accelerate():
    theirs = adapt(llama(), CONFIG, False)
    plain, parameters = logits(theirs), dict(theirs.named_parameters())
    seen = logits(ours := integration.accelerate(copy.deepcopy(theirs)))
    torch.testing.assert_close(seen, plain)
    assert sum(type(m) is peft_layer.AcceleratedLinear for m in ours.modules()) == 6
    assert sum("randlora_A" in key for key in theirs.state_dict()) == 7
    assert sum("randlora_A" in key for key in ours.state_dict()) == 1
    assert integration.accelerate(theirs) is integration.accelerate(theirs) is theirs
    assert all(parameters[name] is parameter for name, parameter in theirs.named_parameters())
    assert type(theirs.base_model) is peft_model.AcceleratedRandLoraModel


@pytest.mark.parametrize("kind", KINDS)
def test_accelerate_holds_16_bit_bases_in_16_bits(kind):
    """PEFT's cast to fp32 is undone, where no value changes by it."""
    model = integration.accelerate(adapt(llama(torch.bfloat16), config("q_proj", **KINDS[kind]), False))
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    A, B, factor = q._pair("default").tensors(torch.bfloat16, torch.device("cpu"))
    assert A is q.randlora_A["default"] and B is q.randlora_B["default"] and factor == 1
    assert {p.dtype for p in q.randlora_lambda.values()} == {torch.float32}
    other = adapt(llama(torch.bfloat16), config("q_proj", **KINDS[kind]), False)
    other.base_model.randlora_B["default"].add_(1e-4)
    assert integration.accelerate(other).base_model.randlora_B["default"].dtype == torch.float32


def test_accelerate_refuses_before_it_changes_anything():
    model = adapt(llama(), CONFIG, False)
    with pytest.raises(ValueError, match="no RandLoRA layers"):
        integration.accelerate(llama())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"q_proj' has merged adapters: call unmerge_adapter\(\)"):
        integration.accelerate(model)
    model.unmerge_adapter()
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.__class__ = type("Mine", (peft_randlora.Linear,), {"__module__": "mine"})
    with pytest.raises(TypeError, match=r"down_proj' is of a class of its own, Mine"):
        integration.accelerate(model)
    assert type(model.base_model) is not peft_model.AcceleratedRandLoraModel
    assert all(type(m) is not peft_layer.AcceleratedLinear for m in model.modules())


def test_lives_on_after_disable(tmp_path):
    model = adapt(llama(), CONFIG)
    model.add_adapter("other", config("k_proj", r=3, sparse=True))
    model.set_adapter("other")
    before = logits(randomize(model))
    model.save_pretrained(tmp_path)
    plain = peft.PeftModel.from_pretrained(llama(), tmp_path / "other", adapter_name="other")
    torch.testing.assert_close(logits(plain), before)
    assert type(plain.base_model) is peft.RandLoraModel


@pytest.mark.parametrize("copied", ["deepcopy", "torch.save"])
def test_copies(copied):
    model = adapt(llama(), CONFIG)
    before = logits(model)
    if copied == "deepcopy":
        other = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    randomize(model, seed=50)
    assert torch.equal(logits(other), before) and not torch.equal(logits(model), before)
    assert [n for n in other.state_dict()] == [n for n in model.state_dict()]
    q = other.base_model.model.model.layers[0].self_attn.q_proj
    assert q.randlora_A is other.base_model.randlora_A is not model.base_model.randlora_A
    assert q._pair("default").bases.given[0] is q.randlora_A["default"], "and does not hold the original's as well"


def test_to_another_dtype():
    model = adapt(llama(), CONFIG)
    with torch.no_grad():
        exact = logits(model)
        model.to(torch.bfloat16)
        assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16}
        assert 0 < (logits(model) - exact).abs().max() < 0.1 * exact.abs().max()
        model.float()
    assert model.base_model.randlora_A["default"].dtype == torch.float32
    assert model.load_state_dict(model.state_dict()).missing_keys == []


def test_disable_adapter_and_requires_grad():
    theirs, ours = both(llama(), CONFIG)
    base = logits(llama())
    with ours.disable_adapter():
        torch.testing.assert_close(logits(ours), base)
        assert not any(p.requires_grad for p in ours.parameters())
    torch.testing.assert_close(logits(ours), logits(theirs))
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]


def test_biases_and_modules_to_save(tmp_path):
    arguments = {"bias": "randlora_only", "modules_to_save": ["last"]}
    model = layers(first=(8, 6), last=(6, 4))
    theirs, ours = both(model, config("first", r=2, **arguments))
    x = torch.randn(5, 8)
    for adapted in (theirs, ours):
        adapted(x).square().sum().backward()
    for (name, a), b in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert a.requires_grad == b.requires_grad, name
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-4)
            b.data.sub_(0.1 * b.grad)
    if version >= (0, 21):  # before that PEFT saves no biases of RandLoRA's layers
        ours.save_pretrained(tmp_path)
        torch.testing.assert_close(peft.PeftModel.from_pretrained(model, tmp_path)(x), ours(x))


def test_generate_takes_the_cache():
    """PEFT's models for a task ask the tuner; one without a task asks the base model, and takes a scope around it."""
    arguments = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    kept = []

    def watch(ids, scores, **_):
        kept.append(update_cache.current().nbytes if update_cache.current() is not None else None)
        return scores

    for task in ("CAUSAL_LM", None):
        settings = copy.copy(CONFIG)
        settings.task_type = task
        model, plain = adapt(llama(), settings).eval(), adapt(llama(), settings, False).eval()
        for scoped in (False, True):
            expected = plain.generate(input_ids=tokens(), **arguments)
            with randlora.inference_cache() if scoped else contextlib.nullcontext():
                got = model.generate(input_ids=tokens(), **arguments, logits_processor=[watch])
            assert torch.equal(got, expected) and update_cache.current() is None
            assert (kept[-1] is not None and kept[-1] > 0) == (scoped or task is not None)
            for adapted in (model, plain):
                for name, parameter in adapted.named_parameters():
                    if "randlora_lambda" in name:
                        parameter.data.mul_(-1)


def test_generate_closes_the_cache_when_it_raises():
    settings = copy.copy(CONFIG)
    settings.task_type = "CAUSAL_LM"
    model = adapt(llama(), settings).eval()

    def fail(ids, scores, **_):
        assert update_cache.current() is not None
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        model.generate(input_ids=tokens(), max_new_tokens=3, logits_processor=[fail], pad_token_id=0)
    assert update_cache.current() is None
