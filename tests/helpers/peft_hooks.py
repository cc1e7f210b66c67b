"""Hooks by which PEFT, from 0.22 on, writes RandLoRA's bases once and reads files with one copy of them or with many.

A stand-in, written from the description of that change, while there is no such PEFT to be had: the model's own copy is
written, or the first layer's where the model has none (adapters that were injected); for reading, every layer gets its
copy again. Two forms of it, as the description fits more than one: ``"lenient"`` goes by the names that are in the
state dict, ``"strict"`` by the layers, and raises where one lacks its copy.
"""

import pytest
from peft.tuners.randlora import RandLoraLayer
from peft.tuners.randlora.model import RandLoraModel
from peft.tuners.tuners_utils import BaseTuner

HOOKS = "_get_adapter_state_dict", "_remap_adapter_state_dict_for_load"
KINDS = "randlora_A", "randlora_B"
FORMS = ("peft",) if HOOKS[0] in vars(RandLoraModel) else ("lenient", "strict")


def _layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, RandLoraLayer)]


def _written(form):
    def _get_adapter_state_dict(cls, model, config, adapter_name, state_dict, unwanted_adapter_names):
        found = super(RandLoraModel, cls)._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for kind in KINDS if config.save_projection else ():
            ending = f"{kind}.{adapter_name}"
            if form == "strict":
                copies = [f"{name}.{ending}" for name in _layers(model)]
                first = found[copies[0]]
            else:
                copies = [key for key in found if key.endswith(f".{ending}") and key != f"base_model.{ending}"]
                first = found[copies[0]] if copies else None
            for key in copies:
                del found[key]
            if f"base_model.{ending}" not in found:
                found[copies[0]] = first
        return found

    return _get_adapter_state_dict


def _read(form):
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        found = super(RandLoraModel, cls)._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for kind in KINDS if config.save_projection else ():
            keys = [f"base_model.{kind}.{adapter_name}"]
            keys += [f"{name}.{kind}.{adapter_name}" for name in _layers(model)]
            held = model.state_dict()
            copy = next(found[key] for key in keys if key in found)
            for key in keys:
                if form == "strict" and key != keys[0]:
                    copy = copy.to(held[key].dtype)
                if key in held:
                    found.setdefault(key, copy)
        return found

    return _remap_adapter_state_dict_for_load


@pytest.fixture(params=FORMS)
def new_peft(request, monkeypatch):
    """PEFT with these hooks: its own, or a stand-in."""
    if request.param == "peft":
        return request.param
    if not hasattr(BaseTuner, HOOKS[0]):
        pytest.skip("this PEFT has no hooks for state dicts at all")
    for name, hook in zip(HOOKS, (_written(request.param), _read(request.param)), strict=True):
        monkeypatch.setattr(RandLoraModel, name, classmethod(hook), raising=False)
    return request.param
