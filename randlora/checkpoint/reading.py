"""Reading adapters: everything is checked before a model is changed."""

from __future__ import annotations

import copy
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from .. import injection
from ..bases import RandomBases
from ..config import CONFIG_NAME, RandLoraConfig
from ..injection import Plan, adapted_layers
from .layout import PARAMETERS, PREFIX, PROJECTIONS, WEIGHTS_NAME, describe, read_config, read_metadata


@dataclass(frozen=True)
class Loaded:
    """An adapter that was read and fits: its plan, and its tensors by the name of what they belong to."""

    plan: Plan
    parameters: dict[str, dict[str, Tensor]]  # slot -> randlora_lambda, randlora_gamma
    saved: dict[str, dict[str, Tensor]]  # module to save -> its state dict
    biases: dict[str, Tensor]

    def copy_into(self, model: nn.Module, adapter_name: str) -> None:
        layers, modules = adapted_layers(model), dict(model.named_modules())
        with torch.no_grad():
            for slot, parts in self.parameters.items():
                for part, tensor in parts.items():
                    getattr(layers[slot], part)[adapter_name].copy_(tensor)
            for path, tensor in self.biases.items():
                modules[_adapted_path(path, modules)].bias.copy_(tensor)
        for name, state in self.saved.items():
            modules[name].modules_to_save[adapter_name].load_state_dict(state)


def read(model: nn.Module, folder: str | os.PathLike) -> Loaded:
    """Read the adapter in `folder` and check that it fits `model`, which is not changed.

    Raises:
        ValueError: a file that is missing, damaged, not safe to load, of a newer format, or of another model, rank or
            kind; the message names the file and what is wrong with it.
    """
    folder = Path(folder)
    config = read_config(folder)
    path = folder / WEIGHTS_NAME
    described, tensors = _read_tensors(path)
    if described is not None and described["r"] != config.r:
        raise ValueError(
            f"{path} was written with r = {described['r']}, but {CONFIG_NAME} beside it says r = {config.r}: the two "
            "do not belong together"
        )
    config = copy.deepcopy(config)
    try:
        # First without bases of its own, to see which layers there are.
        drawn = injection.plan(model, copy.deepcopy(config), RandomBases(1, 1, config.r))
        bases = _bases(path, config, described, tensors, drawn)
        plan = injection.plan(model, config, bases)
    except ValueError as error:
        raise ValueError(f"{folder} does not fit this model: {error}") from error
    return _assign(path, model, plan, tensors)


def _read_tensors(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    if not path.exists():
        pickles = [p.name for p in path.parent.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise ValueError(
                f"{path.parent / pickles[0]} is a pickle, which can run any code when it is loaded: load it with PEFT, "
                "if you trust it, and save it anew with safe_serialization=True"
            )
        raise ValueError(f"{path}: not found")
    described = describe(path, read_metadata(path))
    tensors = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118
            # PEFT up to 0.21 writes the projections once per layer: gigabytes that all say the same.
            copied = key.endswith(PROJECTIONS) and key.startswith(PREFIX)
            if not copied or f"base_model.{key.rpartition('.')[2]}" not in tensors:
                tensors[f"base_model.{key.rpartition('.')[2]}" if copied else key] = file.get_tensor(key)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{path}: {key} holds NaN or infinity")
    return described, tensors


def _no_bases(r: int) -> RandomBases:
    return RandomBases(1, 1, r)


def _bases(
    path: Path, config: RandLoraConfig, described: dict[str, Any] | None, tensors: dict[str, Tensor], plan: Plan
) -> RandomBases | None:
    """The bases of a file: its projections, or made again, and then proven by the fingerprint."""
    given = [tensors.pop(f"base_model.{name}", None) for name in PROJECTIONS]
    if (given[0] is None) != (given[1] is None):
        raise ValueError(f"{path} holds only one of randlora_A and randlora_B")
    if given[0] is not None and (described is None or described["settings"]["prng"] == "none"):
        return RandomBases.from_tensors(*given)
    if described is None:
        warnings.warn(
            f"{path} holds no projections, and nothing by which the bases made here could be checked: they are drawn "
            "as PEFT draws them on machines with bfloat16",
            stacklevel=4,
        )
        return None
    if described["settings"]["prng"] == "none":
        raise ValueError(f"{path} lacks its projections, which cannot be made again")
    need = injection.required(config, plan.slots)
    if tuple(described["dims"]) != need:
        raise ValueError(
            f"its bases are for layers up to (max_dim, min_dim, num_bases) = {tuple(described['dims'])}, not {need}"
        )
    bases = injection.make_bases(config, need, plan.peft_dims)
    bases.require(*need)
    made = bases.fingerprint(*need)
    if made != described["fingerprint"]:
        raise ValueError(
            f"the random bases made here are not those that it was trained with (fingerprint {made[:16]}..., expected "
            f"{described['fingerprint'][:16]}...)"
        )
    return bases


def _assign(path: Path, model: nn.Module, plan: Plan, tensors: dict[str, Tensor]) -> Loaded:
    """Every tensor of the file to where it belongs, or ``ValueError``."""
    tensors = dict(tensors)
    parameters: dict[str, dict[str, Tensor]] = {}
    for slot, sizes in plan.slots.items():
        n = plan.num_bases(slot)
        for part, shape in zip(PARAMETERS, ((plan.config.r, n), (n, min(sizes))), strict=True):
            key = f"{PREFIX}{slot}.{part}"
            parameters.setdefault(slot, {})[part] = _take(path, tensors, key, shape)
    saved: dict[str, dict[str, Tensor]] = {}
    modules = dict(model.named_modules())
    for name in plan.saved:
        module = modules[name]
        state = (module.original_module if hasattr(module, "modules_to_save") else module).state_dict()
        saved[name] = {k: _take(path, tensors, f"{PREFIX}{name}.{k}", v.shape) for k, v in state.items()}
    biases = {}
    if plan.config.bias != "none":
        for key in [k for k in tensors if k.endswith("bias")]:
            name = key.removeprefix(PREFIX).removesuffix("bias").removesuffix(".").removesuffix(".base_layer")
            bias = getattr(modules.get(name), "bias", None)
            if not isinstance(bias, Tensor):
                raise ValueError(f"{path} has {key}, but this model has no such bias")
            biases[name] = _take(path, tensors, key, bias.shape)
    if tensors:
        raise ValueError(f"{path} holds what this adapter has no place for: {', '.join(sorted(tensors)[:3])}")
    return Loaded(plan, parameters, saved, biases)


def _take(path: Path, tensors: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise ValueError(f"{path} has no {key}: it is not an adapter of this model")
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{path}: {key} must have shape {list(shape)}, got {list(tensor.shape)}: it is of another model or rank"
        )
    return tensor


def _adapted_path(path: str, modules: dict[str, nn.Module]) -> str:
    return f"{path}.base_layer" if f"{path}.base_layer" in modules else path
