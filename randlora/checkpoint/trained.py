"""What an adapter trains: where its numbers are, under which names a file has them, and copies of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import RandLoraConfig
from ..distributed.gathering import whole
from ..distributed.zero3 import gathered, shape_of
from ..layers.offload import with_numbers
from ..layers.randlora_layer import RandLoraLayer
from ..model.parts import is_bias, modules_with
from ..names import plain_name
from . import biases
from .layout import PARAMETERS, PREFIX, check_numbers


class Source(NamedTuple):
    """A tensor of the model that is written into the file: it itself, and its name in the model's state dict.

    ``dtype``: of what it must fit into when it is read; None: its own.
    """

    live: Any
    name: str
    dtype: torch.dtype | None = None


def sources(
    model: nn.Module,
    adapter_name: str,
    config: RandLoraConfig,
    layers: Mapping[str, RandLoraLayer],
    saved: Mapping[str, Any] | None = None,
) -> dict[str, Source]:
    """Name in the file -> tensor, of all that the adapter trains in `model`, in which it has these `layers`.

    `saved`: path -> module to save, where they are PEFT's.
    """
    found: dict[str, Source] = {}
    for slot, layer in layers.items():
        for part in PARAMETERS:
            name = plain_name(f"model.{slot}.{part}.{adapter_name}")
            live = getattr(layer, part)[adapter_name]
            found[f"{PREFIX}{plain_name(slot)}.{part}"] = Source(live, name, torch.float32)
    saved = modules_with(model, adapter_name) if saved is None else saved
    for path, module in saved.items():
        for part, value in module.modules_to_save[adapter_name].state_dict(keep_vars=True).items():
            name = plain_name(f"model.{path}.modules_to_save.{adapter_name}.{part}")
            found[plain_name(f"{PREFIX}{path}.{part}")] = Source(value, name)
    adapted = set(map(plain_name, layers))
    for path, bias in biases.trained(model, config.bias, layers, saved).items():
        owner = path.rpartition(".")[0]
        # As in a model that has this adapter only.
        key = f"{PREFIX}{owner}.base_layer.bias" if owner in adapted else f"{PREFIX}{path}"
        found[key] = Source(bias, f"model.{path}")
    return found


def values(
    model: nn.Module, adapter_name: str, found: Mapping[str, Source], state: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """What is to be written for `found`, from a :func:`plain_state` or from `model`, not copied yet.

    Raises:
        ValueError: what is missing there, has another shape, is no tensor, or has no numbers.
    """
    if state is None:
        result = with_numbers(model, {key: source.live for key, source in found.items()})
    else:
        result = _of_state(adapter_name, state, found)
    for key, value in result.items():
        what = f"adapter {adapter_name!r} cannot be saved: {found[key].name}"
        if not isinstance(value, Tensor):
            raise ValueError(f"{what} must be a tensor, got {type(value).__name__}")
        if value.is_meta:
            raise ValueError(f"{what} is on the meta device and has no numbers: load or train it first")
    return result


def plain_state(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of the model by the names that :class:`Source` has."""
    return {_plain_key(key): value for key, value in state_dict.items()}


def in_state(state: Mapping[str, Any], found: Mapping[str, Source]) -> dict[str, Any]:
    """Those values of a :func:`plain_state` that stand for `found`, by the names in the file."""
    return {key: state[source.name] for key, source in found.items() if source.name in state}


def _of_state(adapter_name: str, state: Mapping[str, Any], found: Mapping[str, Source]) -> dict[str, Any]:
    given = in_state(state, found)
    for key, source in found.items():
        if key not in given:
            raise ValueError(
                f"adapter {adapter_name!r} cannot be saved: state_dict has no {source.name}, which this model has"
            )
        value = given[key]
        if isinstance(value, Tensor) and value.shape != shape_of(source.live):
            raise ValueError(
                f"adapter {adapter_name!r} cannot be saved: state_dict has {source.name} of shape "
                f"{list(value.shape)}, where this model's is {list(shape_of(source.live))}"
            )
    return given


def _plain_key(key: str) -> str:
    """A key of a model's state dict without what DistributedDataParallel and torch.compile add; a bias's plain name."""
    key = plain_name(key).removeprefix("module.")
    return biases.plain(key) if is_bias(key) and ".modules_to_save." not in key else key


def copies(given: Mapping[str, Tensor], kept: bool = True) -> dict[str, Tensor]:
    """Copies on the CPU, whole where several processes hold parts: all of these call this. None where not `kept`."""
    result = {}
    for key, value in given.items():
        with gathered([value]):
            tensor = whole(value)
            if kept:
                result[key] = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return result


def check(adapter_name: str, copied: Mapping[str, Tensor], found: Mapping[str, Source]) -> None:
    """Raises ``ValueError`` for numbers that could not be loaded again."""
    for key, value in copied.items():
        what = f"adapter {adapter_name!r} cannot be saved: {found[key].name}"
        check_numbers(what, value, found[key].dtype or value.dtype)
