"""Files of PEFT from 0.22 on, which hold the bases once: every writer's file is read by every reader.

Until that version is here, its hooks are a stand-in's (``helpers/peft_hooks.py``).
"""

import contextlib
import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
from helpers.peft_hooks import HOOKS, KINDS, new_peft  # noqa: E402, F401
from helpers.peft_models import adapt, bases, both, config, layers, llama, logits, randomize  # noqa: E402
from peft.tuners.randlora.model import RandLoraModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

import randlora  # noqa: E402
import randlora.integrations.peft as integration  # noqa: E402
from randlora.integrations.peft import self_check  # noqa: E402

TARGETS = "q_proj", "v_proj", "down_proj"


def on(accelerated):
    return integration.enable() if accelerated else contextlib.nullcontext()


@contextlib.contextmanager
def old_peft(monkeypatch):
    """Without the hooks."""
    with monkeypatch.context() as patch:
        for name in HOOKS:
            if name in vars(RandLoraModel):
                patch.delattr(RandLoraModel, name)
        yield


def other_bases(model):
    """Others than the seed gives, so that they must come from the file."""
    for kind in KINDS:
        store = getattr(model.base_model, kind)
        if hasattr(store, "partner"):
            store["default"] = store["default"] * 1.25
        else:
            store["default"].mul_(1.25)
    return model


def projections(folder):
    return [key for key in load_file(folder / "adapter_model.safetensors") if key.endswith(KINDS)]


def load(folder, accelerated, **arguments):
    """The model, and whether PEFT missed something."""
    with on(accelerated), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(llama(), folder, **arguments)
    return model, any("missing adapter keys" in str(w.message) for w in caught)


def test_every_file_is_read_by_everyone(new_peft, monkeypatch, tmp_path):  # noqa: F811
    theirs, ours = map(other_bases, both(llama(), config(*TARGETS)))
    with old_peft(monkeypatch):
        theirs.save_pretrained(tmp_path / "old")
    theirs.save_pretrained(tmp_path / "new")
    with on(True):
        ours.save_pretrained(tmp_path / "ours")
        adapt(llama(), config(*TARGETS), False).save_pretrained(tmp_path / "built before")
    names = [f"base_model.{kind}" for kind in KINDS]
    assert len(projections(tmp_path / "old")) == 2 * 7
    for folder in ("new", "ours", "built before"):
        assert projections(tmp_path / folder) == names, folder
    expected, wanted = logits(theirs), bases(theirs)
    for folder in ("old", "new", "ours"):
        for accelerated in (False, True):
            for arguments in ({}, {"low_cpu_mem_usage": True}):
                model, missing = load(tmp_path / folder, accelerated, **arguments)
                torch.testing.assert_close(logits(model), expected)
                assert not missing, (folder, accelerated)
                for got, base in zip(bases(model), wanted, strict=True):
                    assert torch.equal(got, base)
        with old_peft(monkeypatch):
            model, missing = load(tmp_path / folder, True)
            torch.testing.assert_close(logits(model), expected)
            assert not missing
    # Our own model reads PEFT's new form, and PEFT of this form reads what that model writes.
    for folder in ("old", "new"):
        model = randlora.RandLoraModel.from_pretrained(llama(), tmp_path / folder)
        torch.testing.assert_close(logits(model), expected)
    for for_peft in (False, True):
        model.save_pretrained(tmp_path / "model", **({"for_peft": True} if for_peft else {}))
        for accelerated in (False, True):
            read, missing = load(tmp_path / "model", accelerated)
            torch.testing.assert_close(logits(read), expected)
            assert not missing


def test_several_adapters(new_peft, tmp_path):  # noqa: F811
    theirs, ours = both(llama(), config(*TARGETS))
    for model, accelerated in ((theirs, False), (ours, True)):
        with on(accelerated):
            model.add_adapter("second", config(*TARGETS))
            randomize(model, seed=40).set_adapter("second")
            model.save_pretrained(tmp_path / str(accelerated))
    expected = logits(theirs)
    for writer in ("False", "True"):
        assert projections(tmp_path / writer / "second") == [f"base_model.{kind}" for kind in KINDS]
        for accelerated in (False, True):
            model, _ = load(tmp_path / writer, accelerated)
            with on(accelerated):
                model.load_adapter(tmp_path / writer / "second", "again")
            model.set_adapter("again")
            torch.testing.assert_close(logits(model), expected)


def test_without_projections(new_peft, tmp_path):  # noqa: F811
    theirs, ours = both(llama(), config(*TARGETS, save_projection=False))
    for writer, model in ((False, theirs), (True, ours)):
        with on(writer):
            model.save_pretrained(tmp_path)
        assert projections(tmp_path) == []
        for reader in (False, True):
            torch.testing.assert_close(logits(load(tmp_path, reader)[0]), logits(theirs))


@pytest.mark.parametrize("accelerated", [False, True])
def test_injected_adapters(accelerated, new_peft, tmp_path):  # noqa: F811
    """No tuner has the bases: one layer's are written, under names without PEFT's prefix."""
    expected = None
    with on(accelerated):
        model = randomize(peft.inject_adapter_in_model(config("up", "down"), layers(up=(5, 9), down=(9, 4))))
        for kind in KINDS:
            base = getattr(model.up, kind)["default"] * 1.5
            for layer in (model.up, model.down):
                getattr(layer, kind)["default"] = base
        state = peft.get_peft_model_state_dict(model)
        save_file(state, tmp_path / "adapter.safetensors")  # which refuses tensors that share memory
    assert [key for key in state if key.endswith(KINDS)] == [f"up.{kind}" for kind in KINDS]
    x = torch.randn(3, 5)
    expected = model(x)
    for reader in (False, True):
        for prefix in ("", "base_model.model."):
            with on(reader):
                other = peft.inject_adapter_in_model(config("up", "down"), layers(up=(5, 9), down=(9, 4)))
                given = {prefix + key: tensor for key, tensor in load_file(tmp_path / "adapter.safetensors").items()}
                result = peft.set_peft_model_state_dict(other, given)
            assert not result.unexpected_keys
            torch.testing.assert_close(other(x), expected)


def test_all_agrees(new_peft, monkeypatch):  # noqa: F811
    monkeypatch.setattr(peft, "__version__", "0.22.0")
    assert set(integration.compare().values()) == {None}
    assert list(integration.compare()) == list(self_check.QUESTIONS)


def test_models_of_transformers(new_peft, monkeypatch, tmp_path):  # noqa: F811
    """``model.add_adapter``, for which transformers 5 asks for PEFT 0.22."""
    pytest.importorskip("peft.functional", reason="transformers' mixin takes it")
    from transformers.integrations import peft as mixin

    monkeypatch.setattr(mixin, "MIN_PEFT_VERSION", "0.16.0", raising=False)
    for accelerated in (False, True):
        model = llama()
        with on(accelerated):
            model.add_adapter(config(*TARGETS))
            randomize(model).save_pretrained(tmp_path / str(accelerated))
        expected = logits(model)
    for writer in ("False", "True"):
        assert len(projections(tmp_path / writer)) == 2
        for accelerated in (False, True):
            model = llama()
            with on(accelerated):
                model.load_adapter(str(tmp_path / writer))
            torch.testing.assert_close(logits(model), expected)
    if int(transformers.__version__.split(".")[0]) < 5:
        return  # it hands the file's names on in another form, which the stand-in does not know
    # What docs/peft.md says: transformers has no place for bases that stand once for the whole model.
    with on(True):
        other_bases(adapt(llama(), config(*TARGETS))).save_pretrained(tmp_path / "once")
    for accelerated in (False, True):
        model = llama()
        with on(accelerated):
            found = model.load_adapter(str(tmp_path / "once"))
        if found is not None:  # earlier transformers say it in the log only
            assert {f"base_model.{kind}.default" for kind in KINDS} <= set(found.unexpected_keys)
        torch.testing.assert_close(logits(model), expected)
