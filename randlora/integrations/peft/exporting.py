"""Models with PEFT's adapters for ``randlora.export``."""

from __future__ import annotations

from peft.tuners.randlora.layer import RandLoraLayer
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ...export.source import AdaptedByPeft
from .layer import AcceleratedLinear


def adapted_by_peft(model: nn.Module, adapter: str) -> AdaptedByPeft | None:
    """A ``PeftModel``, its tuner, or a model with injected adapters; None where there is no RandLoRA layer.

    Raises:
        TypeError: layers that randlora does not compute, as they were made before it was enabled.
    """
    layers = [module for module in model.modules() if isinstance(module, RandLoraLayer)]
    if not layers:
        return None
    if not all(isinstance(layer, AcceleratedLinear) for layer in layers):
        raise TypeError(
            f"the RandLoRA layers of this {type(model).__name__} are PEFT's own: call "
            "randlora.integrations.peft.accelerate(model) first, or save it and give the folder"
        )
    tuner = next((module for module in model.modules() if isinstance(module, BaseTuner)), None)
    base: nn.Module = model if tuner is None else tuner.model
    configs = getattr(model if tuner is None else tuner, "peft_config", {})
    saved = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save
    }
    return AdaptedByPeft(base, configs, saved)
