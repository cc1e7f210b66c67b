"""Weights that several modules of a model share: merging changes one of them and must not change the others."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..distributed.gathering import is_dtensor
from ..layers import offload
from ..layers.randlora_layer import RandLoraLayer

FLAG = "tie_word_embeddings"
Ties = dict[int, list[tuple[str, nn.Module, str]]]  # by parameter: (module's name, module, name in the module)


def shared(model: nn.Module) -> Ties:
    """The parameters that more than one module has, or that were one before they were offloaded."""
    owners: Ties = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module, key))
    return {key: found for key, found in owners.items() if len(found) > 1} | _offloaded(model)


def _offloaded(model: nn.Module) -> Ties:
    """What is tied to embeddings and offloaded with them: parameters on meta of their own, with equal numbers."""
    if not any(getattr(getattr(module, "config", None), FLAG, False) for module in model.modules()):
        return {}
    alike: dict[tuple, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and _is_offloaded(module, key):
                alike.setdefault((parameter.shape, parameter.dtype), []).append((name, module, key))
    ties = {}
    for owners in alike.values():
        first = next((owner for owner in owners if isinstance(owner[1], nn.Embedding)), None)
        if first is not None and len(found := [o for o in owners if _equal(first, o)]) > 1:
            ties[id(first[1]._parameters[first[2]])] = found
    return ties


def _is_offloaded(module: nn.Module, key: str) -> bool:
    parameter = module._parameters[key]
    return parameter is not None and parameter.is_meta and bool(offload.hooks(module))


def _equal(owner: tuple[str, nn.Module, str], other: tuple[str, nn.Module, str]) -> bool:
    return torch.equal(offload.read(*owner[1:]), offload.read(*other[1:]))


def computes_with_flag(model: nn.Module) -> bool:
    """Whether the model uses the flag in a call, as T5 does to scale its output, so that it cannot be changed."""
    return any(_reads_flag(module) for module in model.modules() if hasattr(getattr(module, "config", None), FLAG))


def _are_apart(found: list[tuple[str, nn.Module, str]]) -> bool:
    if all(_is_offloaded(module, key) for _, module, key in found):
        return not all(_equal(found[0], other) for other in found[1:])
    return len({id(module._parameters.get(key)) for _, module, key in found}) > 1


def part(model: nn.Module, merged: Iterable[str]) -> None:
    """Give layers that `merged` is about to change a weight of their own where another module has the same one."""
    merged, ties = set(merged), shared(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, RandLoraLayer) or not merged & set(layer.randlora_lambda):
            continue
        base, at = layer.get_base_layer(), layer.weight_name
        weight: Any = base._parameters.get(at)
        found = next((f for f in ties.values() if any(m is base and key == at for _, m, key in f)), [])
        others = [other for other in found if other[1] is not base]
        if not others or not (type(weight) is nn.Parameter or is_dtensor(weight)):
            continue
        found[:] = others
        if not weight.is_meta:  # what is offloaded is merged into apart from the others
            setattr(base, at, _copy(weight))
        warnings.warn(
            f"{name!r} shares its weight with {_names(others)}: merging gives it one of its own, they are no longer "
            "tied",
            stacklevel=3,
        )


def forget(model: nn.Module, before: Ties) -> None:
    """Where modules no longer share what they shared `before`, keep transformers from tying them again.

    Tied again, after saving and loading, they would lose what was merged into one of them. transformers has one flag
    for all ties of a model, so that those which are left are parted too.
    """
    broken = any(map(_are_apart, before.values()))
    # Not only where it is True: PEFT may have set it meanwhile, and left the others tied.
    tied: list[Any] = [module for module in model.modules() if hasattr(getattr(module, "config", None), FLAG)]
    if not broken or not tied:
        return
    left = [(module, key) for found in shared(model).values() for _, module, key in found[1:]]
    copies = [(m, key, None if _is_offloaded(m, key) else _copy(m._parameters[key])) for m, key in left]
    for module, key, copy in copies:
        if copy is None:
            offload.write(module, key, offload.read(module, key).clone())
        else:
            module._parameters[key] = copy
    for module in tied:
        if isinstance(getattr(module, "all_tied_weights_keys", None), dict):
            module.all_tied_weights_keys = {}
    read = {id(module.config) for module in tied if _reads_flag(module)}  # T5's scales its output by it
    configs = {id(module.config): module.config for module in tied if id(module.config) not in read}.values()
    flags = [(config, getattr(config, FLAG)) for config in configs]
    try:
        for config, _ in flags:
            setattr(config, FLAG, False)
    except BaseException:
        for config, flag in flags:
            setattr(config, FLAG, flag)
        raise


def before_unloading(model: nn.Module, merged: Iterable[str]) -> Ties:
    """What is shared, with the modules that take the places of saved ones; warns of those that it parts."""
    merged, ties = list(merged), shared(model)
    for name, saved in model.named_modules():
        if not (hasattr(saved, "modules_to_save") and hasattr(saved, "original_module")):  # ours, or PEFT's
            continue
        chosen = next((saved.modules_to_save[n] for n in merged if n in saved.modules_to_save), None)
        if chosen is None:
            continue
        copies = dict(zip(saved.original_module.modules(), chosen.modules(), strict=True))
        for found in ties.values():
            others = [other for other in found if other[1] not in copies]
            if others and len(others) < len(found):
                warnings.warn(
                    f"{name!r} shared its weight with {_names(others)} and was trained apart from it: they are no "
                    "longer tied",
                    stacklevel=4,
                )
            found[:] = [(n, copies.get(module, module), key) for n, module, key in found]
    return ties


def _copy(parameter: Any) -> nn.Parameter:
    with torch.inference_mode(False):
        return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _names(owners: Iterable[tuple[str, nn.Module, str]]) -> str:
    return " and ".join(name.removesuffix(".base_layer").removesuffix(".original_module") for name, _, _ in owners)


def _reads_flag(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and FLAG in code.co_names
