"""Trained biases: which ones a file holds, under which names, and where they go.

Names are those of the unadapted and uncompiled model; wrappers put ``base_layer``, ``_orig_mod`` and others in between.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.gathering import copy_into
from ..layers.attention import MultiheadAttention
from ..model.parts import adapted_layers, is_bias
from ..names import plain_name

_WRAPPERS = ("base_layer", "original_module")


def plain(name: str) -> str:
    return ".".join(part for part in plain_name(name).split(".") if part not in _WRAPPERS)


def biases_of(model: nn.Module, slots: Collection[str] = ()) -> dict[str, Tensor]:
    """Plain name -> bias, also of the layers that an attention at one of `slots` will be taken apart into."""
    found: dict[str, Tensor] = {
        plain(name): parameter
        for name, parameter in model.named_parameters()
        if is_bias(name) and "modules_to_save" not in name.split(".")
    }
    for parent in {slot.rpartition(".")[0] for slot in slots}:
        attention: Any = model.get_submodule(parent)
        packed = isinstance(attention, nn.MultiheadAttention) and not isinstance(attention, MultiheadAttention)
        if packed and attention.in_proj_bias is not None:
            parts = attention.in_proj_bias.chunk(3)
            found |= {plain(f"{parent}.{n}_proj.bias"): part for n, part in zip("qkv", parts, strict=True)}
    return found


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """The plain name of each bias in :func:`biases_of` -> all of its plain names: several where modules share it."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_bias(name) and "modules_to_save" not in name.split("."):
            found.setdefault(id(parameter), []).append(plain(name))
    return {names[0]: names for names in found.values()}


def trained(model: nn.Module, mode: str, slots: Collection[str], saved: Collection[str]) -> dict[str, Tensor]:
    """What an adapter with ``bias=mode`` trains: plain name -> bias; those of `saved` modules are saved with them."""
    if mode == "none":
        return {}
    adapted = {plain(name) for name in (*slots, *adapted_layers(model))}
    inside = tuple(f"{plain(name)}." for name in saved)
    names = names_of(model)

    def is_adapted(name: str) -> bool:
        return any(other.rpartition(".")[0] in adapted for other in names.get(name, [name]))

    return {
        name: bias
        for name, bias in biases_of(model, slots).items()
        if (mode == "all" or is_adapted(name)) and not name.startswith(inside)
    }


def set_biases(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    present = biases_of(model)
    with torch.no_grad():
        for name, value in values.items():
            copy_into(present[name], value)
