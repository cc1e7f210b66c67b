"""Reading adapters: everything is checked before a model is changed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import injection
from ..bases import RandomBases
from ..checks import FLOATS
from ..injection import Plan, adapted_layers
from ..offload import REAL_AGAIN
from ..store import shared
from . import biases
from .hub import find_folder
from .layout import (
    DAMAGE,
    PARAMETERS,
    PREFIX,
    PROJECTIONS,
    WEIGHTS_NAME,
    as_bytes,
    checksum,
    is_projection,
    make_config,
    open_weights,
)


@dataclass(frozen=True)
class Loaded:
    """An adapter that was read and fits: its plan, and its tensors by the name of what they belong to."""

    plan: Plan
    parameters: dict[str, dict[str, Tensor]]  # slot -> randlora_lambda, randlora_gamma
    saved: dict[str, dict[str, Tensor]]  # module to save -> its state dict
    biases: dict[str, Tensor]

    def copy_into(self, model: nn.Module, adapter_name: str) -> None:
        layers, modules = adapted_layers(model), dict(model.named_modules())
        for slot, parts in self.parameters.items():
            for part, tensor in parts.items():
                _put(getattr(layers[slot], part), adapter_name, tensor)
        for name, state in self.saved.items():
            module = modules[name].modules_to_save[adapter_name]
            for part in module.modules():
                for held in (part._parameters, part._buffers):
                    for key in held.keys() - part._non_persistent_buffers_set:  # what is not saved gets no numbers
                        _make_room(held, key, torch.device("cpu"))
            module.load_state_dict(state)
        biases.set_biases(model, self.biases)


def _put(parameters: nn.ParameterDict, adapter_name: str, tensor: Tensor) -> None:
    """Copy into a parameter. A model on meta gets its weights later, but the adapter's numbers are here."""
    _make_room(parameters._parameters, adapter_name, tensor.device)
    with torch.no_grad():
        parameters[adapter_name].copy_(tensor)


def _make_room(held: dict[str, Tensor | None], name: str, device: torch.device) -> None:
    """Memory for a tensor on meta, put where it is held: accelerate's init_empty_weights undoes other assignments."""
    tensor = held[name]
    if tensor is not None and tensor.is_meta:
        room = torch.empty_like(tensor, device=device)
        held[name] = nn.Parameter(room, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else room


def read(model: nn.Module, folder: str | os.PathLike) -> Loaded:
    """Read the adapter in `folder` and check that it fits `model`, which is not changed.

    `folder` may be ``"user/repository"`` of the Hugging Face Hub.

    Raises:
        ValueError: a file that is missing, damaged, not safe to load, of a newer format, or of another model, rank or
            kind; the message names the file and what is wrong with it.
    """
    folder = find_folder(folder)
    path = folder / WEIGHTS_NAME
    with _Weights.open(path) as file:
        config = make_config(folder, file.described)
        tensors = file.tensors()
        if file.described is not None and checksum(file.described, tensors) != file.described["sha256"]:
            raise ValueError(f"{path} is damaged, or was changed since it was written: its checksum does not match")
        try:
            # The first bases only stand in, until it is known that the file has the layers of this model.
            plan = injection.plan(model, config, RandomBases(1, 1, config.r))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not fit this model: {error}") from error
        loaded = _assign(path, model, plan, tensors, file.described is not None)
        bases = _bases(file, plan)
    return dataclasses.replace(loaded, plan=dataclasses.replace(plan, bases=bases))


@dataclass(frozen=True)
class _Weights:
    """An open ``adapter_model.safetensors``; what it cannot read, or what is no number, raises ``ValueError``."""

    path: Path
    file: Any
    described: dict[str, Any] | None

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path) -> Iterator[_Weights]:
        pickles = sorted(p.name for p in path.parent.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth"))
        if pickles and not os.path.lexists(path):
            raise ValueError(
                f"{path.parent / pickles[0]} is a pickle, which can run any code when it is loaded: load it with PEFT, "
                "if you trust it, and save it anew with safe_serialization=True"
            )
        with open_weights(path) as (file, described):
            yield cls(path, file, described)

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
            _check_floats(self.path, key, tensor, tensor.dtype)
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
        return injection.make_bases(config, need, plan.peft_dims)
    expected = file.described["fingerprint"]
    if tuple(file.described["dims"]) != need:
        raise ValueError(
            f"{file.path}: its bases are for layers up to (max_dim, min_dim, num_bases) = "
            f"{tuple(file.described['dims'])}, not {need}: it is of another model"
        )
    if file.described["prng"] != "none":
        bases = injection.make_bases(config, need, plan.peft_dims)
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


def _assign(path: Path, model: nn.Module, plan: Plan, tensors: dict[str, Tensor], complete: bool) -> Loaded:
    """Every tensor of the file to where it belongs, or ``ValueError``."""
    tensors = dict(tensors)
    parameters: dict[str, dict[str, Tensor]] = {}
    for slot, sizes in plan.slots.items():
        n = plan.num_bases(slot)
        for part, shape in zip(PARAMETERS, ((plan.config.r, n), (n, min(sizes))), strict=True):
            key = f"{PREFIX}{slot}.{part}"
            parameters.setdefault(slot, {})[part] = _take(path, tensors, key, shape, torch.float32)
    saved: dict[str, dict[str, Tensor]] = {}
    modules = dict(model.named_modules())
    for name in plan.saved:
        module = modules[name]
        state = (module.original_module if hasattr(module, "modules_to_save") else module).state_dict()
        saved[name] = {k: _take(path, tensors, f"{PREFIX}{name}.{k}", v.shape, v.dtype) for k, v in state.items()}
        for copied in ("original_module", "modules_to_save"):  # PEFT 0.21 writes their biases once more
            tensors.pop(f"{PREFIX}{name}.{copied}.bias", None)
    found = _assign_biases(path, model, plan, tensors, complete)
    if tensors:
        raise ValueError(f"{path} holds what this adapter has no place for: {', '.join(sorted(tensors)[:3])}")
    return Loaded(plan, parameters, saved, found)


def _assign_biases(
    path: Path, model: nn.Module, plan: Plan, tensors: dict[str, Tensor], complete: bool
) -> dict[str, Tensor]:
    if plan.config.bias == "none":
        return {}
    present, found = biases.biases_of(model, plan.slots), {}
    for key in filter(biases.is_bias, list(tensors)):
        name = biases.plain(key.removeprefix(PREFIX))
        if name in present and present[name].is_meta:
            raise ValueError(
                f"{path} holds the bias {name}, which is on the meta device in this model: the weights that it gets "
                f"later would undo it. Load them first, or, if it is offloaded, call {REAL_AGAIN}"
            )
        if name in present:
            found[name] = _take(path, tensors, key, present[name].shape, present[name].dtype)
    missing = set(biases.trained(model, plan.config.bias, plan.slots, plan.saved)) - set(found)
    if missing and complete and plan.config.bias == "randlora_only":  # other adapters' layers need not be in it
        missing = {name for name in missing if name.rpartition(".")[0] in plan.slots}
    if missing and complete:
        raise ValueError(f"{path} lacks the trained biases of this model, such as {min(missing)}")
    if missing and not found:
        warnings.warn(
            f"{path} was saved with bias={plan.config.bias!r} but holds no biases (PEFT up to 0.20 writes none): those "
            "of the model are kept",
            stacklevel=5,
        )
    return found


def _take(path: Path, tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Remove `key`, a tensor of this shape that can be copied into one of this dtype, or ``ValueError``."""
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise ValueError(f"{path} has no {key}: it is not an adapter of this model")
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{path}: {key} must have shape {list(shape)}, got {list(tensor.shape)}: it is of another model or rank"
        )
    if dtype.is_floating_point:
        _check_floats(path, key, tensor, dtype)
    elif tensor.dtype != dtype:
        raise ValueError(f"{path}: {key} must be {dtype}, got {tensor.dtype}")
    return tensor


def _check_floats(path: Path, key: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{path}: {key} must be floating-point numbers, got {tensor.dtype}")
    if not torch.isfinite(tensor.to(dtype)).all():
        raise ValueError(f"{path}: {key} holds NaN, infinity or numbers too large for {dtype}")
