"""Reading adapters: everything is checked before a model is changed."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..bases.random_bases import RandomBases
from ..bases.shared import shared
from ..checks import FLOATS
from ..layers import offload
from ..model import injection
from ..model.injection import Plan, adapted_layers
from ..model.targets import is_supported, layer_sizes
from ..names import plain_name
from . import biases
from .hub import find_folder
from .layout import (
    DAMAGE,
    PARAMETERS,
    PREFIX,
    PROJECTIONS,
    WEIGHTS_NAME,
    as_bytes,
    check_numbers,
    checksum,
    is_projection,
    make_config,
    open_adapter,
)


@dataclass(frozen=True)
class Loaded:
    """An adapter that was read and fits: its plan, and its tensors by the name of what they belong to."""

    plan: Plan
    parameters: dict[str, dict[str, Tensor]]  # slot -> randlora_lambda, randlora_gamma
    saved: dict[str, dict[str, Tensor]]  # module to save -> its state dict
    biases: dict[str, Tensor]

    def overwritten(self, model: nn.Module) -> list[Tensor]:
        """Those numbers of `model` that :meth:`copy_into` writes over."""
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
            module.load_state_dict(state)
        biases.set_biases(model, self.biases)


def _put(parameters: nn.ParameterDict, adapter_name: str, tensor: Tensor) -> None:
    """Copy into a parameter. A model on meta gets its weights later, but the adapter's numbers are here."""
    offload.make_room(parameters._parameters, adapter_name, tensor.device)
    with torch.no_grad():
        parameters[adapter_name].copy_(tensor)


def read(model: nn.Module, folder: str | os.PathLike) -> Loaded:
    """Read the adapter in `folder` and check that it fits `model`, which is not changed.

    `folder` may be ``"user/repository"`` of the Hugging Face Hub.

    Raises:
        ValueError: a file that is missing, damaged, not safe to load, of a newer format, or of another model, rank or
            kind; the message names the file and what is wrong with it.
    """
    folder = find_folder(folder)
    path = folder / WEIGHTS_NAME
    with _Weights.open(folder) as file:
        config = make_config(folder, file.described, file.given)
        try:
            # The first bases only stand in, until it is known that the file has the layers of this model.
            plan = injection.plan(model, config, RandomBases(1, 1, config.r))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not fit this model: {error}") from error
        # By the header first: nothing is read that is larger than what it is for.
        shapes = file.shapes()
        places = _assign(path, model, plan, shapes, file.described is not None)
        _check_projections(path, model, plan, shapes)
        tensors = file.tensors()
        if file.described is not None and checksum(file.described, tensors) != file.described["sha256"]:
            raise ValueError(f"{path} is damaged, or was changed since it was written: its checksum does not match")
        values = places.read(path, tensors)
        bases = _bases(file, plan)
    return Loaded(dataclasses.replace(plan, bases=bases), *values)


class _Place(NamedTuple):
    """A tensor of the file, and the dtype of what it will be copied into."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class _Places:
    """Where in the file the tensors of :class:`Loaded` are."""

    parameters: dict[str, dict[str, _Place]]
    saved: dict[str, dict[str, _Place]]
    biases: dict[str, _Place]

    def read(self, path: Path, tensors: Mapping[str, Tensor]) -> tuple:
        """The same with the tensors, or ``ValueError`` for what cannot be copied."""

        def values(places: Mapping[str, _Place]) -> dict[str, Tensor]:
            for key, _, dtype in places.values():
                check_numbers(f"{path}: {key}", tensors[key], dtype)
            return {name: tensors[place.key] for name, place in places.items()}

        parameters, saved = ({k: values(v) for k, v in group.items()} for group in (self.parameters, self.saved))
        return parameters, saved, values(self.biases)


@dataclass(frozen=True)
class _Weights:
    """An open ``adapter_model.safetensors``; what it cannot read, or what is no number, raises ``ValueError``."""

    path: Path
    file: Any
    described: dict[str, Any] | None
    given: dict[str, Any] | None  # adapter_config.json

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[_Weights]:
        path = folder / WEIGHTS_NAME
        with open_adapter(folder) as (file, described, given):
            pickles = sorted(p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth"))
            if file is None and pickles:
                raise ValueError(
                    f"{folder / pickles[0]} is a pickle, which can run any code when it is loaded: load it with PEFT, "
                    "if you trust it, and save it anew with safe_serialization=True"
                )
            if file is None:
                raise ValueError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
            yield cls(path, file, described, given)

    def shapes(self) -> dict[str, _Place]:
        """Shapes of all tensors by their names in a model that is not compiled, from the header alone."""
        found: dict[str, _Place] = {}
        for key in self.file.keys():  # noqa: SIM118
            if (name := plain_name(key)) in found:
                raise ValueError(f"{self.path} holds {name} twice, as {found[name].key} and as {key}")
            found[name] = _Place(key, tuple(self.file.get_slice(key).get_shape()))
        return found

    def get(self, key: str) -> Tensor:
        """The tensor, which may be a view of the file itself."""
        try:
            return self.file.get_tensor(key)
        except DAMAGE as error:
            raise ValueError(f"{self.path}: {key} cannot be read: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """All but the projections."""
        return {key: self.get(key) for key in self.file.keys() if not is_projection(key)}  # noqa: SIM118

    def projections(self) -> tuple[Tensor, Tensor] | None:
        keys = sorted(filter(is_projection, self.file.keys()))
        first = [min((k for k in keys if k.endswith(name)), key=len, default=None) for name in PROJECTIONS]
        if first == [None, None]:
            return None
        if None in first:
            raise ValueError(f"{self.path} holds only one of randlora_A and randlora_B")
        A, B = (self.get(key) for key in first)
        for key, tensor in zip(first, (A, B), strict=True):
            check_numbers(f"{self.path}: {key}", tensor, tensor.dtype if tensor.dtype in FLOATS else torch.float32)
        return A, B


def _bases(file: _Weights, plan: Plan) -> RandomBases:
    """The bases of a file: made again and proven by the fingerprint, or its projections."""
    config, need = plan.config, injection.required(plan.config, plan.slots)
    if file.described is None:
        projections = file.projections()
        if projections is not None:
            return _given(file.path, plan, projections)
        warnings.warn(
            f"{file.path} holds no projections, and nothing by which the bases made here could be checked: they are "
            'drawn as PEFT draws them on machines with bfloat16 ("prng": "peft-fp16" in its config: on those without)',
            stacklevel=4,
        )
        return injection.make_bases(config, plan.slots, plan.peft_dims)
    expected = file.described["fingerprint"]
    if tuple(file.described["dims"]) != need:
        raise ValueError(
            f"{file.path}: its bases are for layers up to (max_dim, min_dim, num_bases) = "
            f"{tuple(file.described['dims'])}, not {need}: it is of another model"
        )
    if file.described["prng"] != "none":
        bases = injection.make_bases(config, plan.slots, plan.peft_dims)
        bases.require(*need)
        if (made := bases.fingerprint(*need)) == expected:
            return bases
    if file.described["prng"] != "philox" and (projections := file.projections()) is not None:
        bases = _given(file.path, plan, projections)
        # A fingerprint covers how bases are made, which nobody knows of given ones.
        if file.described["prng"] != "none" or (made := bases.fingerprint(*need)) == expected:
            return bases
    elif file.described["prng"] == "none":
        raise ValueError(f"{file.path} lacks its projections, which cannot be made again")
    raise ValueError(
        f"{file.path}: the random bases made here are not those that it was trained with (fingerprint {made[:16]}..., "
        f"expected {expected[:16]}...)"
    )


def _given(path: Path, plan: Plan, projections: tuple[Tensor, Tensor]) -> RandomBases:
    """Bases of these values, the same object for equal ones, with memory apart from the file."""
    digest = hashlib.sha256()
    for tensor in projections:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(as_bytes(tensor))
    try:
        bases = shared(
            ("given", digest.digest()), lambda: RandomBases.from_tensors(*(tensor.clone() for tensor in projections))
        )
        if bases.r != plan.config.r:
            raise ValueError(f"the config says r = {plan.config.r}, but these bases have r = {bases.r}")
        bases.require(*injection.required(plan.config, plan.slots))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its projections do not fit: {error}") from error
    return bases


def _check_projections(path: Path, model: nn.Module, plan: Plan, shapes: dict[str, _Place]) -> None:
    """PEFT sizes projections by the layers of the model's first adapter: none of this model's can need larger ones."""
    r, largest = plan.config.r, max(max(layer_sizes(m)) for m in model.modules() if is_supported(m))
    num_bases = max(plan.config.num_bases or 0, -(-largest // r))
    for name, (key, shape, _) in shapes.items():
        limit = r * largest if name.endswith("A") else r * largest * num_bases
        if is_projection(name) and math.prod(shape) > limit:
            raise ValueError(
                f"{path}: {key} {list(shape)} is too large: bases for this model, whose layers have at most {largest} "
                f"features, have at most {limit} numbers there"
            )


def _assign(path: Path, model: nn.Module, plan: Plan, shapes: dict[str, _Place], complete: bool) -> _Places:
    """Every tensor of the file to where it belongs, or ``ValueError``."""
    shapes = {name: place for name, place in shapes.items() if not is_projection(name)}
    parameters: dict[str, dict[str, _Place]] = {}
    for slot, sizes in plan.slots.items():
        n = plan.num_bases(slot)
        for part, shape in zip(PARAMETERS, ((plan.config.r, n), (n, min(sizes))), strict=True):
            key = f"{PREFIX}{plain_name(slot)}.{part}"
            parameters.setdefault(slot, {})[part] = _take(path, shapes, key, shape, torch.float32)
    saved: dict[str, dict[str, _Place]] = {}
    modules = dict(model.named_modules())
    for name in plan.saved:
        module, prefix = modules[name], PREFIX + plain_name(name)
        state = (module.original_module if hasattr(module, "modules_to_save") else module).state_dict()
        saved[name] = {
            k: _take(path, shapes, f"{prefix}.{plain_name(k)}", tuple(v.shape), v.dtype) for k, v in state.items()
        }
        for copied in ("original_module", "modules_to_save"):  # PEFT 0.21 writes their biases once more
            shapes.pop(f"{prefix}.{copied}.bias", None)
    found = _assign_biases(path, model, plan, shapes, complete)
    if shapes:
        raise ValueError(f"{path} holds what this adapter has no place for: {', '.join(sorted(shapes)[:3])}")
    return _Places(parameters, saved, found)


def _assign_biases(
    path: Path, model: nn.Module, plan: Plan, shapes: dict[str, _Place], complete: bool
) -> dict[str, _Place]:
    if plan.config.bias == "none":
        return {}
    present, found = biases.biases_of(model, plan.slots), {}
    for key in filter(biases.is_bias, list(shapes)):
        name = biases.plain(key.removeprefix(PREFIX))
        if name in present and present[name].is_meta:
            raise ValueError(
                f"{path} holds the bias {name}, which is on the meta device in this model: the weights that it gets "
                f"later would undo it. Load them first, or, if it is offloaded, call {offload.REAL_AGAIN}"
            )
        if name in present:
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


def _take(path: Path, shapes: dict[str, _Place], name: str, shape: tuple[int, ...], dtype: torch.dtype) -> _Place:
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
