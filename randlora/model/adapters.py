"""The part of ``RandLoraModel`` that knows its adapters: which it has, which act, are trained and are merged."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from ..checkpoint.layout import PEFT_TYPE
from ..config import RandLoraConfig
from ..distributed.fsdp import hold_parts
from ..layers.bypassed import forget_calls
from ..layers.modules_to_save import ModuleToSave
from ..layers.randlora_layer import RandLoraLayer
from ..layers.unmerging import merged_or_not, unmerged
from ..undo import all_or_nothing
from . import injection, ties, weighted_sum
from .adapter_plan import Plan, filled, plan_adapter
from .parts import adapted_layers, saved_modules, train_biases


class Adapters(nn.Module):
    """Base class of :class:`randlora.RandLoraModel`, which documents it. ``model`` is the adapted model."""

    model: nn.Module

    def _init_adapters(self) -> None:
        self.peft_config: dict[str, RandLoraConfig] = {}
        self._active: list[str] = []
        self._enabled, self._inference_mode = True, False
        self._switched = 0  # how often what is trained may have changed

    # ---- adding and removing adapters ----

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Add an adapter, initialised as `config` says. It acts once :meth:`set_adapter` names it.

        Raises:
            TypeError, ValueError: as :func:`randlora.get_peft_model`, and for a second adapter with ``bias`` other than
                ``"none"``; nothing has been changed then.
        """
        injection.check_name(adapter_name, self.peft_config)
        plan = plan_adapter(self.model, RandLoraConfig.of(config))
        with all_or_nothing(self):
            self._add(adapter_name, plan)

    def _add(self, adapter_name: str, plan: Plan) -> None:
        """Callers undo what a failure leaves."""
        config = plan.config
        with_bias = [name for name, other in self.peft_config.items() if other.bias != "none"]
        if with_bias and config.bias != "none":
            raise ValueError(
                f"bias={config.bias!r}: the biases are the base model's, and adapter {with_bias[0]!r} trains them "
                "already"
            )
        flags = self._flags() if self.peft_config else []
        if config.base_model_name_or_path is None:
            config = filled(config, base_model_name_or_path=getattr(self.model, "name_or_path", None) or None)
        injection.apply(self.model, plan, adapter_name)
        if not config.inference_mode:
            self._check_trained([adapter_name])
        self.peft_config[adapter_name] = config
        if self._active:
            self._set_active(self._active, self._inference_mode)
        else:
            self._set_active([adapter_name], config.inference_mode)
        restore(flags)  # what was there before is trained, or frozen, as before
        if not self._enabled:
            self._enable(False)
        forget_calls(self)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first of the others becomes active."""
        self._check(adapter_name)
        if any(adapter_name in layer.merged_adapters for layer in adapted_layers(self.model).values()):
            raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() first")
        left = [name for name in self._active if name != adapter_name]
        others = [name for name in self.peft_config if name != adapter_name]
        flags, orphaned = self._flags(), self._active == [adapter_name]
        with all_or_nothing(self):
            self._set_active(others[:1] if orphaned else left, self._inference_mode)
            for layer in adapted_layers(self.model).values():
                if adapter_name in layer.randlora_lambda:
                    layer.delete_adapter(adapter_name)
            for module in saved_modules(self.model).values():
                if adapter_name in module.modules_to_save:
                    del module.modules_to_save[adapter_name]
            del self.peft_config[adapter_name]
            if not orphaned:
                restore(flags)

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter whose update is exactly ``sum_i weights[i] * dW_i``.

        RandLoRA's update is bilinear in lambda and gamma, so that a sum has this form only for a single adapter, or for
        adapters on the same bases whose gammas, or whose lambdas, are equal. Any others add up when they are active
        together (``set_adapter([...])``) or merged.

        Raises:
            ValueError: where the sum is not exact, with the reason; nothing is changed then.
        """
        injection.check_name(adapter_name, self.peft_config)
        for name in adapters:
            self._check(name)
        flags = self._flags()
        with all_or_nothing(self):
            self.peft_config[adapter_name] = weighted_sum.add(self, list(adapters), list(weights), adapter_name)
            self._set_active(self._active, self._inference_mode)
            restore(flags)

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
        self._switched += 1
        for layer in adapted_layers(self.model).values():
            layer.set_adapter([name for name in names if name in layer.randlora_lambda], inference_mode)
        for module in saved_modules(self.model).values():
            module.set_adapter(next((name for name in names if name in module.modules_to_save), None), inference_mode)
        if any(config.bias != "none" for config in self.peft_config.values()):
            modes = set() if inference_mode else {self.peft_config[name].bias for name in names}
            train_biases(self.model, modes)

    def _parts(self) -> list[RandLoraLayer | ModuleToSave]:
        return [*adapted_layers(self.model).values(), *saved_modules(self.model).values()]

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Freeze or unfreeze the parameters of these adapters, whether they are active or not."""
        names = self._names(adapter_names)
        if requires_grad:
            self._check_trained(names)
        with all_or_nothing(self, deep=False):
            self._switched += 1
            for layer in adapted_layers(self.model).values():
                for name in filter(layer.randlora_lambda.__contains__, names):
                    layer.randlora_lambda[name].requires_grad_(requires_grad)
                    layer.randlora_gamma[name].requires_grad_(requires_grad)
            for module in saved_modules(self.model).values():
                for name in filter(module.modules_to_save.__contains__, names):
                    module.modules_to_save[name].requires_grad_(requires_grad)

    def _check_trained(self, adapter_names: Sequence[str]) -> None:
        for layer in adapted_layers(self.model).values():
            layer.check_trained([name for name in adapter_names if name in layer.randlora_lambda])

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
        hold_parts(self.modules())
        return [(parameter, parameter.requires_grad) for parameter in self.parameters()]

    # ---- merging ----

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add updates (default: of the active adapters) to the base weights. :meth:`unmerge_adapter` takes them back.

        Raises:
            ValueError, TypeError: an unknown name; a layer that cannot be merged into, such as one with a
                parametrised weight, or one that FSDP2 shards; with `safe_merge` a merged weight that is not finite.
                Nothing is changed then.
        """
        names = self._names(adapter_names)
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
