"""The part of ``RandLoraModel`` that says which of a model's adapters act, are trained and are merged."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence

from torch import nn

from ..config import PEFT_TYPE, RandLoraConfig
from ..layers.merging import merged_or_not, unmerged
from ..undo import all_or_nothing
from . import injection, ties
from .injection import adapted_layers, saved_modules


class ActiveAdapters(nn.Module):
    """Base class of :class:`randlora.RandLoraModel`, which documents it. ``model`` is the adapted model."""

    model: nn.Module

    def _init_adapters(self) -> None:
        self.peft_config: dict[str, RandLoraConfig] = {}
        self._active: list[str] = []
        self._enabled, self._inference_mode = True, False

    # ---- which adapters act ----

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of them if there are several (as in PEFT)."""
        return self._active[0] if len(self._active) == 1 else self.active_adapters

    @property
    def active_peft_config(self) -> RandLoraConfig:
        """The first active adapter's config."""
        if not self._active:
            raise ValueError("no adapter is active")
        return self.peft_config[self._active[0]]

    @property
    def peft_type(self) -> str:
        return PEFT_TYPE

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate these adapters, which add up; they become trainable (not with `inference_mode`), others frozen.

        Merged adapters are unmerged first, with a warning (as in PEFT): they would go on acting.

        Raises:
            ValueError: an unknown name, or several adapters that have a copy of one module of ``modules_to_save``.
        """
        names = list(dict.fromkeys(self._names(adapter_name)))
        for path, module in saved_modules(self.model).items():
            if len(several := [name for name in names if name in module.modules_to_save]) > 1:
                raise ValueError(f"{' and '.join(several)} cannot act together: both have a copy of {path!r} to save")
        if any(layer.merged for layer in adapted_layers(self.model).values()):
            warnings.warn("set_adapter: merged adapters are unmerged first", stacklevel=2)
        with all_or_nothing(self, *self._parts(), deep=False):
            self._set_active(names, inference_mode)
            self.unmerge_adapter()

    def _set_active(self, names: list[str], inference_mode: bool) -> None:
        """Callers undo what a failure leaves."""
        self._active, self._inference_mode = names, inference_mode
        for layer in adapted_layers(self.model).values():
            layer.set_adapter([name for name in names if name in layer.randlora_lambda], inference_mode)
        for module in saved_modules(self.model).values():
            module.set_adapter(next((name for name in names if name in module.modules_to_save), None), inference_mode)
        if any(config.bias != "none" for config in self.peft_config.values()):
            modes = set() if inference_mode else {self.peft_config[name].bias for name in names}
            injection.train_biases(self.model, modes)

    def _parts(self) -> list[nn.Module]:
        return [*adapted_layers(self.model).values(), *saved_modules(self.model).values()]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the parameters of these adapters, whether they are active or not."""
        names = self._names(adapter_names)
        with all_or_nothing(self, deep=False):
            for layer in adapted_layers(self.model).values():
                for name in filter(layer.randlora_lambda.__contains__, names):
                    layer.randlora_lambda[name].requires_grad_(requires_grad)
                    layer.randlora_gamma[name].requires_grad_(requires_grad)
            for module in saved_modules(self.model).values():
                for name in filter(module.modules_to_save.__contains__, names):
                    module.modules_to_save[name].requires_grad_(requires_grad)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While this lasts, the model computes as without adapters (trained biases stay); merged ones are unmerged."""
        if not self._enabled:
            yield
            return
        flags, active = self._flags(), self._active
        self._enable(False)
        try:
            yield
        finally:
            self._enable(True)
            if self._active == active:
                restore(flags)

    def enable_adapter_layers(self) -> None:
        """Undo :meth:`disable_adapter_layers`."""
        self._enable(True)

    def disable_adapter_layers(self) -> None:
        """As :meth:`disable_adapter`, until :meth:`enable_adapter_layers`."""
        self._enable(False)

    def _enable(self, enabled: bool) -> None:
        parts = self._parts()
        with all_or_nothing(self, *parts, deep=False):
            self._enabled = enabled
            for part in parts:
                part.enable_adapters(enabled)

    def _flags(self) -> list[tuple[nn.Parameter, bool]]:
        return [(parameter, parameter.requires_grad) for parameter in self.parameters()]

    # ---- merging ----

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add updates (default: of the active adapters) to the base weights. :meth:`unmerge_adapter` takes them back.

        Raises:
            ValueError, TypeError: an unknown name; a layer that cannot be merged into, such as one with a
                parametrised weight; a model that FSDP2 shards; with `safe_merge` a merged weight that is not finite.
                Nothing is changed then.
        """
        names = self._names(adapter_names)
        injection.check_whole(self)
        wanted = injection.to_merge(self.model, names)
        with all_or_nothing(self), merged_or_not(wanted):
            shared = ties.shared(self.model)
            ties.part(self.model, names)
            for layer, adapters in wanted.items():
                layer.merge(safe_merge=safe_merge, adapter_names=adapters)
            ties.forget(self.model, shared)

    def _names(self, adapter_names: str | Sequence[str] | None) -> list[str]:
        if adapter_names is None:
            return self.active_adapters
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._check(name)
        return names

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bit for bit."""
        with self._unmerged():
            pass

    def _unmerged(self) -> contextlib.AbstractContextManager[None]:
        return unmerged(layer for layer in adapted_layers(self.model).values() if layer.merged)

    def _check(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            known = ", ".join(self.peft_config) or "none"
            raise ValueError(f"this model has no adapter named {adapter_name!r}; it has: {known}")


def restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    """Set ``requires_grad`` of parameters back to what it was."""
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
