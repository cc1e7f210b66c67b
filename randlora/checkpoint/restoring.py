"""Putting saved numbers back into the adapters that a model has: how a training goes on from its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..distributed.fsdp import hold_parts
from ..model.adapters import Adapters
from ..model.parts import layers_with, modules_with
from ..undo import all_or_nothing
from . import reading
from .layout import PARAMETERS, WEIGHTS_NAME, folder_of
from .reading import Loaded


def holds_adapters(model: Adapters, folder: str | os.PathLike) -> bool:
    """Whether `folder` has a file of one of the model's adapters."""
    return any((folder_of(folder, name) / WEIGHTS_NAME).is_file() for name in model.peft_config)


def restore(model: Adapters, folder: str | os.PathLike) -> None:
    """Copy the numbers of all adapters of `model`, as ``save_pretrained(folder)`` wrote them, into its own parameters.

    The parameters stay the same objects and require gradients as before, so that an optimizer goes on with them. Where
    several processes hold parts of them, all call this, read the same files, and take their parts.
    Files of adapters that the model has not are left alone.

    Raises:
        ValueError: a file is missing or damaged, or its layers, modules to save, rank, scaling or bases are not those
            of the model's adapter of that name. Nothing is changed then.
    """
    found = {name: reading.read(model.model, folder_of(folder, name)) for name in model.peft_config}
    for name, loaded in found.items():
        for what, there, here in _facts(model, name, loaded):
            if there != here:
                raise ValueError(
                    f"{folder_of(folder, name)} is not of this model's adapter {name!r}: {what} must be {here}, got "
                    f"{there}. Adapt the model as it was when the file was written"
                )
    hold_parts(model.modules())
    numbers = [tensor for name, loaded in found.items() for tensor in _numbers(model, name, loaded)]
    with all_or_nothing(model, values=numbers):
        for name, loaded in found.items():
            loaded.copy_into(model.model, name)


def _facts(model: Adapters, name: str, loaded: Loaded) -> Iterator[tuple[str, Any, Any]]:
    """What makes the adapter: how it is called, what the file says, and what the model has. Each needs those before."""
    plan, config, layers = loaded.plan, model.peft_config[name], layers_with(model.model, name)
    yield "layers that are not in both", sorted(set(plan.slots) ^ set(layers))[:3], []
    yield "modules_to_save that are not in both", sorted(set(plan.saved) ^ set(modules_with(model.model, name)))[:3], []
    for field in ("r", "randlora_alpha", "bias"):
        yield field, getattr(plan.config, field), getattr(config, field)
    for path, layer in layers.items():
        yield f"num_bases at {path!r}", plan.num_bases(path), layer.num_bases[name]
    bases, dims = next(iter(layers.values())).bases[name], plan.required()
    if bases is not plan.bases and bases.fingerprint(*dims) != plan.bases.fingerprint(*dims):
        yield "bases", plan.bases, bases


def _numbers(model: Adapters, name: str, loaded: Loaded) -> list[Tensor]:
    """What ``loaded.copy_into`` writes over."""
    layers, modules = layers_with(model.model, name).values(), modules_with(model.model, name).values()
    parameters = [getattr(layer, part)[name] for layer in layers for part in PARAMETERS]
    copies = [module.modules_to_save[name].state_dict(keep_vars=True) for module in modules]
    return [*parameters, *(t for state in copies for t in state.values()), *loaded.overwritten(model.model)]
