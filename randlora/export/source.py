"""Where an exported adapter comes from: a folder, which stands for an adapted model, or a model of PEFT."""

from __future__ import annotations

import contextlib
import copy
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.hub import find_folder
from ..checkpoint.layout import CONFIG_NAME, WEIGHTS_NAME, folder_of
from ..config import RandLoraConfig
from ..model.model import RandLoraModel
from ..model.of_config import load_model, model_of_config
from ..model.parts import is_bias

NO_ADAPTER = (
    ": give what get_peft_model() or from_pretrained() returned, as it was before merge_and_unload(), which leaves no "
    "adapter"
)


@dataclass(frozen=True)
class AdaptedByPeft:
    """A model with PEFT's adapters, as an export asks for one: by the names of :class:`randlora.RandLoraModel`."""

    model: nn.Module  # the one that adapters were put into
    peft_config: Mapping[str, Any]
    saved: Mapping[str, Any]  # path -> module to save, of the adapter that is exported

    def _check(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            known = ", ".join(self.peft_config) or "none"
            raise ValueError(f"this model has no adapter named {adapter_name!r}; it has: {known}")


def model_of_peft(model: Any, adapter: str) -> AdaptedByPeft | None:
    """`model`, if it is one with RandLoRA layers of PEFT that randlora computes; None for any other object.

    Raises:
        TypeError: the layers are PEFT's own.
    """
    if "peft" not in sys.modules or not isinstance(model, nn.Module):
        return None
    from ..integrations.peft import exporting

    return exporting.adapted_by_peft(model, adapter)


def model_of_folder(
    path: str | os.PathLike, adapter: str, base_model: nn.Module | str | os.PathLike | None, with_numbers: bool
) -> RandLoraModel:
    """The adapter that :meth:`randlora.RandLoraModel.save_pretrained` wrote into `path`, on its base model.

    Args:
        base_model: the model, which is not changed, or its name or folder; default: what the adapter's config says.
        with_numbers: False: the base weights may stay on the meta device, as the adapter does not need them.

    Raises:
        ValueError: a folder or a base model that is not there, or that do not fit each other.
    """
    folder = adapter_folder(path, adapter)
    config = RandLoraConfig.from_pretrained(folder)
    if isinstance(base_model, nn.Module):
        base = _twin(base_model, with_numbers)
    else:
        name = base_name(folder, config, base_model)
        with explained(name, folder, base_model):
            base = load_model(name) if with_numbers else model_of_config(name)
    if config.bias != "none":
        for names in places_of_biases(base):
            put_bias(base, names, torch.zeros_like(base.get_parameter(names[0]), device="cpu"))
    return RandLoraModel.from_pretrained(base, folder, adapter)


def adapter_folder(path: str | os.PathLike, adapter: str) -> Path:
    """Where the files of an adapter of this name are, in a folder or a repository. Raises ``ValueError``."""
    whole = find_folder(path)
    if _holds_adapter(folder := folder_of(whole, adapter)):
        return folder
    known = ["default"] if _holds_adapter(whole) else []
    known += sorted(part.name for part in whole.iterdir() if _holds_adapter(part))
    if known:
        raise ValueError(
            f"{path} has no adapter {adapter!r}; it has: {', '.join(known)}. Name it by adapter=, adapter_names= or "
            "--adapter-name"
        )
    model = ", but a whole model" if (whole / "config.json").is_file() else f": there is no {CONFIG_NAME}"
    raise ValueError(f"{path} holds no adapter{model}")


def _holds_adapter(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() or (folder / WEIGHTS_NAME).is_file()


def base_name(folder: Path, config: RandLoraConfig, given: str | os.PathLike | None) -> str:
    """The name or folder of the base model: the one that is given, or what the adapter says."""
    name = config.base_model_name_or_path if given is None else os.fspath(given)
    if not name:
        raise ValueError(f"{folder} does not say which model it adapts: give base_model= or --model")
    return name


@contextlib.contextmanager
def explained(name: str, folder: Path, given: Any) -> Iterator[None]:
    """Errors about a base that is not there say where its name comes from, if it was not given."""
    try:
        yield
    except ValueError as error:
        if given is not None or os.path.isdir(name):
            raise
        raise ValueError(
            f"{str(error).rstrip('.')}. {folder} names it as its base: give another by base_model= or --model"
        ) from error


def _twin(model: nn.Module, with_numbers: bool) -> nn.Module:
    """A copy of the modules that shares the numbers, or has none; only biases, which may be loaded, are copied."""
    known: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for name, parameter in model.named_parameters():
        known[id(parameter)] = parameter
        if type(parameter) is nn.Parameter:
            tensor = parameter.detach()
            tensor = tensor.clone() if is_bias(name) else tensor if with_numbers else tensor.to("meta")
            known[id(parameter)] = nn.Parameter(tensor, requires_grad=False)
    return copy.deepcopy(model, known)


def places_of_biases(model: nn.Module) -> Iterator[list[str]]:
    """The names of each bias on the meta device: more than one where layers share it."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.is_meta and (is_bias(name) or name.endswith("in_proj_bias")):
            names.setdefault(id(parameter), []).append(name)
    yield from names.values()


def put_bias(model: nn.Module, names: list[str], value: torch.Tensor) -> None:
    """One parameter with this value in all these places."""
    bias = nn.Parameter(value, requires_grad=False)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = bias
