"""Reading adapters: everything is checked before a model is changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..bases.random_bases import RandomBases
from ..config import config_of_files
from ..distributed import zero3
from ..distributed.fsdp import hold_parts
from ..distributed.gathering import copy_into, split_as
from ..layers import offload
from ..model.adapter_plan import Plan, plan_adapter
from ..model.parts import adapted_layers, is_bias
from ..names import plain_name
from . import biases
from .bases_of_file import check_sizes, on_bases_of
from .hub import find_folder
from .layout import PARAMETERS, PREFIX, WEIGHTS_NAME, check_numbers, checksum, is_projection
from .weights import Place, Weights


@dataclass(frozen=True)
class Loaded:
    """An adapter that was read and fits: its plan, and its tensors by the name of what they belong to."""

    plan: Plan
    parameters: dict[str, dict[str, Tensor]]  # slot -> randlora_lambda, randlora_gamma
    saved: dict[str, dict[str, Tensor]]  # module to save -> its state dict
    biases: dict[str, Tensor]

    def overwritten(self, model: nn.Module) -> list[Tensor]:
        """Those numbers of `model` that :meth:`copy_into` writes over."""
        hold_parts(model.modules())
        present = biases.biases_of(model) if self.biases else {}
        return [present[name] for name in self.biases if name in present]

    def copy_into(self, model: nn.Module, adapter_name: str) -> None:
        layers, modules = adapted_layers(model), dict(model.named_modules())
        for slot, parts in self.parameters.items():
            for part, tensor in parts.items():
                _put(getattr(layers[slot], part), adapter_name, tensor)
        for name, state in self.saved.items():
            module = modules[name].modules_to_save[adapter_name]
            offload.make_room_in(module)
            here = module.state_dict(keep_vars=True)
            module.load_state_dict({key: split_as(here.get(key), value) for key, value in state.items()})
        biases.set_biases(model, self.biases)


def _put(parameters: nn.ParameterDict, adapter_name: str, tensor: Tensor) -> None:
    """Copy into a parameter. A model on meta gets its weights later, but the adapter's numbers are here."""
    offload.make_room(parameters._parameters, adapter_name, tensor.device)
    with torch.no_grad():
        copy_into(parameters[adapter_name], tensor)


def read(model: nn.Module, folder: str | os.PathLike, is_trainable: bool = False) -> Loaded:
    """Read the adapter in `folder` and check that it fits `model`, which is not changed.

    Args:
        folder: may be ``"user/repository"`` of the Hugging Face Hub.
        is_trainable: whether the adapter is trained when it first acts, whatever its file says.

    Raises:
        ValueError: a file that is missing, damaged, not safe to load, of a newer format, or of another model, rank or
            kind; the message names the file and what is wrong with it.
    """
    folder = find_folder(folder)
    path = folder / WEIGHTS_NAME
    with Weights.open(folder) as file:
        config = config_of_files(folder, file.described, file.given)
        try:
            # The first bases only stand in, until it is known that the file has the layers of this model.
            plan = plan_adapter(model, config, RandomBases(1, 1, config.r))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not fit this model: {error}") from error
        # By the header first: nothing is read that is larger than what it is for.
        shapes = file.shapes()
        places = _assign(path, model, plan, shapes, file.described is not None)
        check_sizes(path, model, plan, shapes)
        tensors = file.tensors()
        if file.described is not None and checksum(file.described, tensors) != file.described["sha256"]:
            raise ValueError(f"{path} is damaged, or was changed since it was written: its checksum does not match")
        values = places.read(path, tensors)
        plan = on_bases_of(file, plan)
    return Loaded(plan.with_inference_mode(not is_trainable), *values)


@dataclass(frozen=True)
class _Places:
    """Where in the file the tensors of :class:`Loaded` are."""

    parameters: dict[str, dict[str, Place]]
    saved: dict[str, dict[str, Place]]
    biases: dict[str, Place]

    def read(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple:
        """The same with the tensors, or ``ValueError`` for what cannot be copied."""

        def values(places: Mapping[str, Place]) -> dict[str, Tensor]:
            for key, _, dtype in places.values():
                assert dtype is not None  # _Places has places of what is there already
                check_numbers(f"{path}: {key}", tensors[key], dtype)
            return {name: tensors[place.key] for name, place in places.items()}

        parameters, saved = ({k: values(v) for k, v in group.items()} for group in (self.parameters, self.saved))
        return parameters, saved, values(self.biases)


def _assign(path: Path, model: nn.Module, plan: Plan, shapes: dict[str, Place], complete: bool) -> _Places:
    """Every tensor of the file to where it belongs, or ``ValueError``."""
    shapes = {name: place for name, place in shapes.items() if not is_projection(name)}
    parameters: dict[str, dict[str, Place]] = {}
    for slot in plan.slots:
        for part, shape in zip(PARAMETERS, plan.shapes(slot), strict=True):
            key = f"{PREFIX}{plain_name(slot)}.{part}"
            parameters.setdefault(slot, {})[part] = _take(path, shapes, key, shape, torch.float32)
    saved: dict[str, dict[str, Place]] = {}
    modules = dict(model.named_modules())
    for name in plan.saved:
        module, prefix = modules[name], PREFIX + plain_name(name)
        state = (module.original_module if hasattr(module, "modules_to_save") else module).state_dict(keep_vars=True)
        saved[name] = {
            k: _take(path, shapes, f"{prefix}.{plain_name(k)}", tuple(zero3.shape_of(v)), v.dtype)
            for k, v in state.items()
        }
        for copied in ("original_module", "modules_to_save"):  # PEFT 0.21 writes their biases once more
            shapes.pop(f"{prefix}.{copied}.bias", None)
    found = _assign_biases(path, model, plan, shapes, complete)
    if shapes:
        raise ValueError(f"{path} holds what this adapter has no place for: {', '.join(sorted(shapes)[:3])}")
    return _Places(parameters, saved, found)


def _assign_biases(
    path: Path, model: nn.Module, plan: Plan, shapes: dict[str, Place], complete: bool
) -> dict[str, Place]:
    if plan.config.bias == "none":
        return {}
    present, found = biases.biases_of(model, plan.slots), {}
    first = {other: name for name, names in biases.names_of(model).items() for other in names}
    for key in filter(is_bias, list(shapes)):
        name = biases.plain(key.removeprefix(PREFIX))
        name = first.get(name, name)  # PEFT writes one that is shared by every name
        if name in present and present[name].is_meta:
            raise ValueError(
                f"{path} holds the bias {name}, which is on the meta device in this model: the weights that it gets "
                f"later would undo it. Load them first, or, if it is offloaded, call {offload.REAL_AGAIN}"
            )
        if name in present:
            zero3.require_whole(present[name], f"{path} holds the bias {name}, which", "to overwrite")
            found[name] = _take(path, shapes, key, tuple(present[name].shape), present[name].dtype)
    missing = set(biases.trained(model, plan.config.bias, plan.slots, plan.saved)) - set(found)
    if missing and complete and plan.config.bias == "randlora_only":  # other adapters' layers need not be in it
        slots = set(map(plain_name, plan.slots))
        missing = {name for name in missing if name.rpartition(".")[0] in slots}
    if missing and complete:
        raise ValueError(f"{path} lacks the trained biases of this model, such as {min(missing)}")
    if missing and not found:
        warnings.warn(
            f"{path} was saved with bias={plan.config.bias!r} but holds no biases (PEFT up to 0.20 writes none): those "
            "of the model are kept",
            stacklevel=5,
        )
    return found


def _take(path: Path, shapes: dict[str, Place], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Place:
    """Remove `name`, a tensor of this shape that is meant for one of this dtype, or ``ValueError``."""
    place = shapes.pop(name, None)
    if place is None:
        raise ValueError(f"{path} has no {name}: it is not an adapter of this model")
    if place.shape != shape:
        raise ValueError(
            f"{path}: {place.key} must have shape {list(shape)}, got {list(place.shape)}: it is of another model or "
            "rank, or damaged"
        )
    return place._replace(dtype=dtype)
