"""The parts of a model that its adapters have a share in: adapted layers, modules to save, and biases."""

from __future__ import annotations

from torch import nn

from ..layers.modules_to_save import ModuleToSave
from ..layers.randlora_layer import RandLoraLayer

_BIASES = ("bias", "bias_k", "bias_v")


def adapted_layers(model: nn.Module) -> dict[str, RandLoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RandLoraLayer)}


def saved_modules(model: nn.Module) -> dict[str, ModuleToSave]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ModuleToSave)}


def layers_with(model: nn.Module, adapter_name: str) -> dict[str, RandLoraLayer]:
    """The adapted layers that have this adapter."""
    return {name: layer for name, layer in adapted_layers(model).items() if adapter_name in layer.randlora_lambda}


def modules_with(model: nn.Module, adapter_name: str) -> dict[str, ModuleToSave]:
    """The modules to save that have a copy for this adapter."""
    return {name: module for name, module in saved_modules(model).items() if adapter_name in module.modules_to_save}


def is_bias(name: str) -> bool:
    """Whether a parameter of this name is a bias of a layer or of an attention."""
    return name.rpartition(".")[2] in _BIASES


def train_biases(model: nn.Module, modes: set[str]) -> None:
    """Biases of the base model require gradients as these modes (``RandLoraConfig.bias``) ask for.

    Those of a module that an active adapter has a copy of do not: the copy is called in its place.
    """
    own = {id(p) for layer in adapted_layers(model).values() for p in layer.get_base_layer().parameters(recurse=False)}
    replaced = {
        id(p)
        for m in saved_modules(model).values()
        if m.active_adapter is not None
        for p in m.original_module.parameters()
    }
    for name, parameter in model.named_parameters():
        if is_bias(name) and ".modules_to_save." not in name:
            wanted = "all" in modes or ("randlora_only" in modes and id(parameter) in own)
            parameter.requires_grad_(wanted and id(parameter) not in replaced)
