"""Versions of PEFT that nobody has tested: compared with randlora when it is enabled, and by ``check-peft``."""

import contextlib
import logging
import random
import re
import sys
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.peft_models import adapt, config, layers, state_of_peft  # noqa: E402
from peft.tuners import randlora as peft_randlora  # noqa: E402
from torch import nn  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402
from randlora.__main__ import main  # noqa: E402
from randlora.integrations.peft import self_check  # noqa: E402
from randlora.integrations.peft.layer import AcceleratedLinear  # noqa: E402
from randlora.integrations.peft.model import AcceleratedRandLoraModel  # noqa: E402
from randlora.integrations.peft.tiny_pair import SHAPES, layers_of  # noqa: E402

KINDS = "randlora_A", "randlora_B"


# ---- versions ----


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(integration, "_agreed", {})


def on(recwarn, caplog):
    """Whether enable() and accelerate() do something, and what they say."""
    model, before = adapt(layers(a=(8, 6)), config("a"), False), state_of_peft()
    recwarn.clear(), caplog.clear()
    with caplog.at_level(logging.INFO, "randlora"):
        for _ in range(2):
            with integration.enable():
                enabled = state_of_peft() != before
            assert integration.accelerate(model) is model and state_of_peft() == before
    assert (type(model.base_model.model.a) is not peft_randlora.Linear) == enabled
    said = [record.getMessage() for record in caplog.records if record.name.startswith("randlora")]
    return enabled, said, [str(w.message) for w in recwarn if "randlora" in str(w.message)]


VERSIONS = {"0.16.0": 1, "0.21.9.dev0": 1, "0.15.2": 0, "0.22.0": 0, "0.22rc1": 0, "1.0": 0, "unknown": 0}


@pytest.mark.parametrize(("found", "tested"), VERSIONS.items())
def test_versions_that_agree_are_on(found, tested, monkeypatch, recwarn, caplog):
    monkeypatch.setattr(peft, "__version__", found)
    calls = []
    monkeypatch.setattr(self_check, "compare", lambda: calls.append(1) or {"outputs": None})
    enabled, said, warned = on(recwarn, caplog)
    assert enabled and warned == [] and len(calls) == len(said) == 1 - tested
    assert all(f"PEFT 0.16 to 0.21, found is {found}" in text and "randlora is on" in text for text in said)


def test_versions_that_differ_are_left_alone(monkeypatch, recwarn, caplog):
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    monkeypatch.setattr(AcceleratedLinear, "get_delta_weight", lambda self, name: torch.zeros(1))
    enabled, said, warned = on(recwarn, caplog)
    assert not enabled and said == [] and len(warned) == 1
    assert "found is 0.22.0" in warned[0] and "updates (shape of layer up: (11, 5) in PEFT, (1,) in" in warned[0]
    assert "left as it is" in warned[0] and "check-peft" in warned[0]


def test_versions_that_lack_what_randlora_takes_are_left_alone(monkeypatch, recwarn, caplog):
    monkeypatch.setattr(peft, "__version__", "0.15.2")
    monkeypatch.delattr(integration, "self_check")
    monkeypatch.setitem(sys.modules, "randlora.integrations.peft.self_check", None)
    enabled, said, warned = on(recwarn, caplog)
    assert not enabled and said == [] and len(warned) == 1
    assert "what randlora takes from PEFT (ModuleNotFoundError" in warned[0]


def test_enabling_half_is_undone(monkeypatch):
    """A version in which one of the replaced names is missing."""
    replacements, missing = integration._replacements, (peft.utils, "no_such_name", None)
    monkeypatch.setattr(integration, "_replacements", lambda tuner: [*replacements(tuner), missing])
    before = state_of_peft()
    with pytest.raises(AttributeError, match="no_such_name"):
        integration.enable()
    assert state_of_peft() == before and integration._replaced == []
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    before = state_of_peft()
    with pytest.warns(UserWarning, match="no_such_name"):
        integration.enable()
    assert state_of_peft() == before and integration._replaced == []


# ---- the comparison ----


@contextlib.contextmanager
def unusual_settings():
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("enabled", [None, "peft-fp16"])
def test_all_agrees_and_nothing_is_left_changed(enabled):
    def found():
        settings = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), list(warnings.filters)
        numbers = torch.get_rng_state().tolist(), random.getstate()
        return settings, modes, numbers, state_of_peft(), AcceleratedRandLoraModel.half, integration._replaced[:]

    with integration.enable(prng=enabled) if enabled else contextlib.nullcontext(), unusual_settings():
        before = found()
        assert set(integration.compare().values()) == {None}
        after = found()
    assert before == after


def wrapping(cls, name, change):
    """Injects a difference: `change` of the result of a method, and of its arguments."""

    def inject(monkeypatch):
        original = getattr(cls, name)

        def changed(*args, **kwargs):
            return change(original(*args, **kwargs), *args)

        monkeypatch.setattr(cls, name, changed)

    return inject


def first_layer_alone(layer):
    return (layer.in_features, layer.out_features) == SHAPES["down"]


def scaled_base(kind):
    def change(_, tuner, *args):
        store = getattr(tuner, kind)
        store["default"] = store["default"].double() * (1 + 1e-7)

    return wrapping(AcceleratedRandLoraModel, "_draw", change)


def new_layer(change):
    """A change of each new layer of randlora's."""

    def changed(layer, *args):
        change(layer)
        return layer

    def inject(monkeypatch):
        create = AcceleratedRandLoraModel._create_new_module
        monkeypatch.setattr(
            AcceleratedRandLoraModel, "_create_new_module", staticmethod(lambda *a, **k: changed(create(*a, **k)))
        )

    return inject


def add_a_parameter(layer):
    layer.extra = nn.Parameter(torch.zeros(1))


def cast(layer):
    layer.randlora_lambda["default"] = nn.Parameter(layer.randlora_lambda["default"].detach().float())


def freeze(_, tuner, *args):
    for layer in (tuner.model.up, tuner.model.down, tuner.model.square):
        layer.randlora_lambda.requires_grad_(False)


def of_forward(change):
    return wrapping(AcceleratedLinear, "forward", lambda y, layer, *args: change(y) if first_layer_alone(layer) else y)


def of_sparse(monkeypatch):
    def change(y, layer, *args):
        A = layer.randlora_A["default"]
        return y * (1 + 1e-5 * (A == 0).any())

    wrapping(AcceleratedLinear, "forward", change)(monkeypatch)


def while_disabled(monkeypatch):
    wrapping(AcceleratedLinear, "forward", lambda y, layer, *_: y * (1 + layer.disable_adapters))(monkeypatch)


def in_state_dicts(change):
    def changed(state, *args, **kwargs):
        return change(state) if not any(key.endswith("down.randlora_A") for key in state) else state

    return wrapping(peft, "get_peft_model_state_dict", changed)


def without(ending):
    return lambda state: {key: value for key, value in state.items() if not key.endswith(ending)}


def scaled(ending, by):
    return lambda state: {key: value * by if key.endswith(ending) else value for key, value in state.items()}


def reading(change):
    """A change of what is read from files while randlora is enabled, or while it is not."""

    def inject(monkeypatch):
        load = peft.utils.save_and_load.load_peft_weights
        for where in (peft.peft_model, peft.utils, peft):
            monkeypatch.setattr(where, "load_peft_weights", lambda *a, **k: change(load(*a, **k)), raising=False)

    return inject


def setting_nothing(monkeypatch):
    monkeypatch.setattr(peft.utils.save_and_load, "set_peft_model_state_dict", lambda *args, **kwargs: None)


def raising(monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("of a\nnew kind")

    monkeypatch.setattr(AcceleratedLinear, "forward", fails)


def no_unmerge(monkeypatch):
    monkeypatch.setattr(AcceleratedLinear, "unmerge", lambda self: self.merged_adapters.clear())


def copying_accelerate(monkeypatch):
    def accelerate(model):
        for layer in layers_of(model).values():
            layer.randlora_gamma["default"] = nn.Parameter(layer.randlora_gamma["default"].detach().clone())
        return model

    monkeypatch.setattr(self_check, "accelerate", accelerate)


def keeping_deleted(monkeypatch):
    monkeypatch.setattr(AcceleratedRandLoraModel, "delete_adapter", lambda self, adapter_name: None)


def activating_the_second(monkeypatch):
    def change(_, tuner, model, name, *args, **kwargs):
        tuner.set_adapter(name)

    wrapping(AcceleratedRandLoraModel, "inject_adapter", change)(monkeypatch)


LITTLE = 1 + 1e-5
INJECTED = [
    *((f"bases, {kind}", scaled_base(base), base) for kind in ("dense", "sparse", "very_sparse") for base in KINDS),
    ("parameters", new_layer(add_a_parameter), "only randlora has .*extra"),
    ("parameters", new_layer(cast), "dtype of .*lambda.*float64 in PEFT, torch.float32 in randlora"),
    ("parameters", wrapping(AcceleratedRandLoraModel, "inject_adapter", freeze), "requires_grad of .*lambda"),
    ("parameters", new_layer(lambda layer: layer.randlora_gamma["default"].data.mul_(LITTLE)), "gamma.*apart"),
    ("outputs", of_forward(lambda y: y * LITTLE), "layer down: .*apart"),
    ("outputs", of_forward(lambda y: y * torch.nan), "layer down: nan apart"),
    ("outputs", of_forward(lambda y: y.float()), "dtype of layer down"),
    ("outputs", of_forward(lambda y: y[:1]), "shape of layer down"),
    ("outputs", while_disabled, "with adapters disabled"),
    ("outputs", of_sparse, "the model with sparse bases"),
    ("outputs", raising, "RuntimeError: of a"),
    ("gradients", of_forward(lambda y: y * LITTLE - (y * LITTLE - y).detach()), "apart"),
    ("updates", wrapping(AcceleratedLinear, "get_delta_weight", lambda d, *_: d * LITTLE), "layer up"),
    ("merging", wrapping(AcceleratedLinear, "get_delta_weight", lambda d, *_: d * LITTLE), "merged, weight of up"),
    ("merging", wrapping(AcceleratedLinear, "merge", lambda _, layer, *a: layer.merged_adapters.clear()), "the model"),
    ("merging", no_unmerge, "unmerged, weight of up"),
    ("merging", wrapping(AcceleratedRandLoraModel, "_unload_and_optionally_merge", lambda m, *_: m.up), "names"),
    ("accelerate(model)", of_forward(lambda y: y * LITTLE), "the model"),
    ("accelerate(model)", copying_accelerate, "gamma.default is the same object: True in PEFT, False"),
    ("several adapters", keeping_deleted, "after the second adapter was deleted"),
    ("several adapters", activating_the_second, "with a second adapter, active adapters"),
    ("several adapters", wrapping(AcceleratedRandLoraModel, "inject_adapter", freeze), "what is trained"),
    ("several adapters", of_forward(lambda y: y * LITTLE), "with a second adapter, the model"),
    ("state dicts", in_state_dicts(without("up.randlora_lambda")), "only PEFT has .*up.randlora_lambda"),
    ("state dicts", in_state_dicts(scaled("up.randlora_lambda", LITTLE)), "up.randlora_lambda.*apart"),
    ("state dicts", in_state_dicts(without("base_model.randlora_A")), "base_model.randlora_A is there"),
    ("state dicts", in_state_dicts(scaled("base_model.randlora_A", LITTLE)), "randlora_A.*apart"),
    ("state dicts", setting_nothing, "loaded into randlora's model: .*apart"),
    *(
        (what, reading(scaled(ending, LITTLE)), match)
        for what in ("PEFT's file, read by randlora", "randlora's file, read by PEFT")
        for ending, match in (("down.randlora_gamma", "down.randlora_gamma"), ("randlora_B", "with projections"))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("what", "inject", "match"), INJECTED, ids=[f"{what}-{match}" for what, _, match in INJECTED])
def test_every_difference_is_found(what, inject, match, monkeypatch):
    inject(monkeypatch)
    monkeypatch.setattr(self_check, "QUESTIONS", {what: self_check.QUESTIONS[what]})
    before = state_of_peft()
    (found,) = self_check.compare().values()
    assert found is not None and re.search(match, found), found
    assert state_of_peft() == before


def test_every_comparison_has_differences():
    assert {what for what, _, _ in INJECTED} == set(self_check.QUESTIONS)


# ---- the command ----


def test_command(monkeypatch, capsys):
    assert main(["check-peft"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert peft.__version__ in shown[0] and shown[-1] == "all agrees"
    assert [line.rpartition("  ")[2] for line in shown[2:-2]] == ["equal"] * len(self_check.QUESTIONS)
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    monkeypatch.setattr(integration, "compare", lambda: {"outputs": None, "gradients": "of x: 1 apart"})
    assert main(["check-peft"]) == 1
    shown = capsys.readouterr().out
    assert "0.22.0 (not tested)" in shown and shown.endswith(
        "\noutputs    equal\ngradients  DIFFERS: of x: 1 apart\n\n1 of 2 differ\n"
    )
    with pytest.raises(SystemExit) as stopped:
        main(["check-peft", "--help"])
    assert stopped.value.code == 0 and "exit status: 0 if all agrees" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(["check-peft"]) == 2
    assert "pip install peft" in capsys.readouterr().err
