"""Putting saved numbers into the adapters that a model has: its own, to go on training, or those of another adapter."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from ..bases import fingerprint
from ..bases.random_bases import RandomBases
from ..distributed.fsdp import hold_parts
from ..layers import offload
from ..layers.randlora_layer import RandLoraLayer
from ..model.adapters import Adapters
from ..model.parts import layers_with, modules_with
from ..undo import all_or_nothing
from . import biases, reading
from .layout import PARAMETERS, WEIGHTS_NAME, check_numbers, folder_of
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
        for what, there, here in _facts(model, name, loaded, ("r", "randlora_alpha", "bias")):
            if there != here:
                raise ValueError(
                    f"{folder_of(folder, name)} is not of this model's adapter {name!r}: "
                    f"{_difference(what, there, here)}. Adapt the model as it was when the file was written"
                )
        _check_dtypes(model, folder_of(folder, name), name, loaded)
    _copy(model, found)


def hotswap(model: Adapters, folder: str | os.PathLike, name: str) -> None:
    """See :meth:`randlora.RandLoraModel.hotswap`."""
    layers, config = layers_with(model.model, name), model.peft_config[name]
    if any(name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"adapter {name!r} is merged, so that its numbers do not act: call unmerge_adapter() first")
    for layer in layers.values():
        for what, parameters in zip(PARAMETERS, layer.trained_parts(), strict=True):
            if not offload.hooks(parameters):
                offload.require_numbers(parameters[name], f"{what}[{name!r}]", "to replace")
    loaded = reading.read(model.model, folder)
    for what, there, here in _facts(model, name, loaded, ("r", "bias")):
        if there != here:
            raise ValueError(
                f"{folder} cannot take the place of adapter {name!r}: {_difference(what, there, here)}. Add it under a "
                "name of its own with load_adapter()"
            )
    _check_dtypes(model, folder, name, loaded)
    trained = biases.trained(model.model, config.bias, loaded.plan.slots, loaded.plan.saved)
    if missing := sorted(trained.keys() - loaded.biases.keys()):
        raise ValueError(
            f"{folder} has no {missing[0]}, which adapter {name!r} trains: what that has learned would stay. Load the "
            "file into a model of its own"
        )
    _copy(model, {name: _at_alpha(folder, loaded, cast(float, config.randlora_alpha), layers, name)})


def _at_alpha(
    folder: str | os.PathLike, loaded: Loaded, alpha: float, layers: Mapping[str, RandLoraLayer], name: str
) -> Loaded:
    """The same update for an adapter with this alpha: lambda makes up for the difference, rounded once."""
    given = cast(float, loaded.plan.config.randlora_alpha)
    if given == alpha:
        return loaded
    factor = given / alpha if alpha else 0.0
    parameters = {}
    for slot, parts in loaded.parameters.items():
        exact, dtype = parts["randlora_lambda"].double() * factor, layers[slot].randlora_lambda[name].dtype
        scaled = exact.to(dtype)
        rounded = (scaled.double() - exact).abs().amax()
        if not factor or not rounded <= torch.finfo(dtype).eps * exact.abs().amax():  # NaN, where infinity is in it
            raise ValueError(
                f"{folder} was trained with randlora_alpha={given:g}, and adapter {name!r} has {alpha:g}: numbers of "
                f"lambda at {slot!r} that would make up for that are too large or too small for {dtype}. Add it under "
                "a name of its own with load_adapter()"
            )
        parameters[slot] = parts | {"randlora_lambda": scaled}
    return dataclasses.replace(loaded, parameters=parameters)


def _check_dtypes(model: Adapters, folder: str | os.PathLike, name: str, loaded: Loaded) -> None:
    """Raises ``ValueError`` for numbers that the model's parameters, which may have become narrower, cannot hold."""
    for slot, parts in loaded.parameters.items():
        layer = model.model.get_submodule(slot)
        for part, tensor in parts.items():
            check_numbers(f"{folder}: {part} of {slot!r}", tensor, getattr(layer, part)[name].dtype)


def _copy(model: Adapters, found: dict[str, Loaded]) -> None:
    for name in found:
        for path, module in modules_with(model.model, name).items():
            if any(map(offload.hooks, module.modules_to_save[name].modules())):
                raise ValueError(
                    f"adapter {name!r} has a copy of {path!r} that is offloaded, and calls would go on with its old "
                    f"numbers: call {offload.REAL_AGAIN} first"
                )
    hold_parts(model.modules())
    numbers = [tensor for name, loaded in found.items() for tensor in _numbers(model, name, loaded)]
    # Inference tensors can be written in inference mode alone.
    mode = torch.is_inference_mode_enabled() or any(tensor.is_inference() for tensor in numbers)
    with torch.inference_mode(mode), all_or_nothing(model, values=numbers):
        for name, loaded in found.items():
            loaded.copy_into(model.model, name)


def _facts(model: Adapters, name: str, loaded: Loaded, settings: tuple[str, ...]) -> Iterator[tuple[str, Any, Any]]:
    """What makes the adapter: how it is called, what the file says, and what the model has. Each needs those before."""
    plan, config, layers = loaded.plan, model.peft_config[name], layers_with(model.model, name)
    yield "layers that are not in both", sorted(set(plan.slots) ^ set(layers))[:3], []
    yield "modules_to_save that are not in both", sorted(set(plan.saved) ^ set(modules_with(model.model, name)))[:3], []
    for field in settings:
        yield field, getattr(plan.config, field), getattr(config, field)
    for path, layer in layers.items():
        yield f"num_bases at {path!r}", plan.num_bases(path), layer.num_bases[name]
    for bases in {id(layer.bases[name]): layer.bases[name] for layer in layers.values()}.values():
        if not _are_equal(bases, plan.bases, plan.required()):
            yield "bases", plan.bases, bases


def _difference(what: str, there: Any, here: Any) -> str:
    return f"{what}: {', '.join(there)}" if here == [] else f"{what} must be {here}, got {there}"


def _are_equal(one: RandomBases, other: RandomBases, dims: tuple[int, int, int]) -> bool:
    """Whether two stores have the same values in this leading part."""
    if one is other or one.fingerprint(*dims) == other.fingerprint(*dims):
        return True
    for given, made in ((one, other), (other, one)):  # a fingerprint of given ones does not know how they were made
        if given.given is not None and made.given is None:
            return fingerprint.sha256_of(*given.given, made, *dims) == made.fingerprint(*dims)
    return False


def _numbers(model: Adapters, name: str, loaded: Loaded) -> list[Tensor]:
    """What ``loaded.copy_into`` writes over."""
    layers, modules = layers_with(model.model, name).values(), modules_with(model.model, name).values()
    parameters = [getattr(layer, part)[name] for layer in layers for part in PARAMETERS]
    copies = [module.modules_to_save[name].state_dict(keep_vars=True) for module in modules]
    return [*parameters, *(t for state in copies for t in state.values()), *loaded.overwritten(model.model)]
