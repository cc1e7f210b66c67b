"""Modules that are trained in full beside the adapters, one copy per adapter (PEFT: ``modules_to_save``)."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..distributed.parallelized import has_plan_around
from .mixed_batch import MixedBatch, run_apart
from .offload import copy_of


class ModuleToSave(nn.Module):
    """Stands for ``original_module`` and runs the active adapter's copy of it, if there is one."""

    is_modules_to_save = True

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict()
        self.active_adapter: str | None = None
        self.enabled, self.inference_mode = True, False
        self.mixed_batch: MixedBatch | None = None

    def add(self, adapter_name: str) -> None:
        """Raises ``ValueError`` for a module whose copy would go on calling the module that it is a copy of."""
        if any(map(has_plan_around, self.original_module.modules())):
            raise ValueError(
                f"modules_to_save: transformers has put its parallel plan around the forward of this "
                f"{type(self.original_module).__name__}, and a copy of it would call the original: leave it out of the "
                "plan or of modules_to_save"
            )
        fresh = copy_of(self.original_module)
        for parameter in fresh.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
        self.modules_to_save[adapter_name] = fresh

    def set_adapter(self, adapter_name: str | None, inference_mode: bool = False) -> None:
        has_it = adapter_name is not None and adapter_name in self.modules_to_save
        self.active_adapter = adapter_name if has_it else None
        self.inference_mode = inference_mode
        for name, module in self.modules_to_save.items():
            for parameter in module.parameters():
                trained = name == self.active_adapter and not inference_mode and self.enabled
                parameter.requires_grad_(trained and parameter.is_floating_point())

    def enable_adapters(self, enabled: bool) -> None:
        self.enabled = enabled
        self.set_adapter(self.active_adapter, self.inference_mode)

    def mixable_adapters(self) -> list[str]:
        """See :class:`randlora.layers.mixed_batch.Mixable`: nothing of a module to save is ever merged."""
        return list(self.modules_to_save)

    def active_module(self) -> nn.Module:
        if self.active_adapter is None or not self.enabled:
            return self.original_module
        return self.modules_to_save[self.active_adapter]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.mixed_batch is None or not self.enabled:
            return self.active_module()(*args, **kwargs)

        def call(name: str, args: tuple, kwargs: dict) -> Any:
            return dict(self.modules_to_save.items()).get(name, self.original_module)(*args, **kwargs)

        return run_apart(self.mixed_batch, type(self.original_module).__name__, call, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Not there yet: copying, unpickling. accelerate's hooks are those of one module.
            if name in ("original_module", "modules_to_save", "_hf_hook", "_old_forward"):
                raise
            return getattr(self.active_module(), name)
