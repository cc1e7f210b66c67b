"""Weights that several modules of a model share: merging changes one of them and must not change the others."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable

from torch import nn

from .layer import RandLoraLayer

FLAG = "tie_word_embeddings"
Ties = dict[int, list[tuple[str, nn.Module, str]]]  # by parameter: (module's name, module, name in the module)


def shared(model: nn.Module) -> Ties:
    """The parameters that more than one module has."""
    owners: Ties = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((name, module, key))
    return {key: found for key, found in owners.items() if len(found) > 1}


def part(model: nn.Module, merged: Iterable[str]) -> None:
    """Give layers that `merged` is about to change a weight of their own where another module has the same one."""
    merged, ties = set(merged), shared(model)
    for name, layer in model.named_modules():
        if not isinstance(layer, RandLoraLayer) or not merged & set(layer.randlora_lambda):
            continue
        base, weight = layer.get_base_layer(), layer.get_base_layer().weight
        others = [other for other in ties.get(id(weight), ()) if other[1] is not base]
        if not others or type(weight) is not nn.Parameter:
            continue
        ties[id(weight)] = others
        base.weight = _copy(weight)
        warnings.warn(
            f"{name!r} shares its weight with {_names(others)}: merging gives it one of its own, they are no longer "
            "tied",
            stacklevel=3,
        )


def forget(model: nn.Module, before: Ties) -> None:
    """Where modules no longer share what they shared `before`, keep transformers from tying them again.

    Its configs say only whether all of a model's ties are there, so that the others are parted, too. What was merged
    would else be lost in saving and loading.
    """
    broken = [found for found in before.values() if len({id(m._parameters.get(key)) for _, m, key in found}) > 1]
    # Not only where it is True: PEFT may have set it meanwhile, and left the others tied.
    tied = [module for module in model.modules() if hasattr(getattr(module, "config", None), FLAG)]
    if not broken or not tied:
        return
    copies = [(m, key, _copy(m._parameters[key])) for found in shared(model).values() for _, m, key in found[1:]]
    for module, key, copy in copies:
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


def _copy(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _names(owners: Iterable[tuple[str, nn.Module, str]]) -> str:
    return " and ".join(name.removesuffix(".base_layer").removesuffix(".original_module") for name, _, _ in owners)


def _reads_flag(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and FLAG in code.co_names
