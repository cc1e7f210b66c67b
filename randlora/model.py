"""Whole models: ``get_peft_model(model, config)`` puts adapters on a model of linear layers.

Method names, defaults and behaviour follow PEFT's ``PeftModel`` and ``RandLoraModel``. Unlike there, every adapter has
its own rank, kind, seed, number of bases and bases, and adapters whose bases are equal share them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from . import combine, injection
from .config import RandLoraConfig
from .injection import adapted_layers, saved_modules
from .layer import RandLoraLayer
from .mixed import mixed_batch


def get_peft_model(model: nn.Module, config: Any, adapter_name: str = "default") -> RandLoraModel:
    """Adapt `model` in place and return it inside a :class:`RandLoraModel` (PEFT: ``get_peft_model``).

    Args:
        config: a :class:`randlora.RandLoraConfig`, PEFT's ``RandLoraConfig`` (its bases are then drawn as PEFT draws
            them), or a dict of their fields.

    Raises:
        TypeError, ValueError: a config that does not fit the model; nothing has been changed then.
    """
    return RandLoraModel(model, config, adapter_name)


class RandLoraModel(nn.Module):
    """A model with RandLoRA adapters on its layers; attributes that it lacks are those of the wrapped ``model``.

    Everything but the adapters (and what their configs train beside them) is frozen. ``peft_config`` maps adapter names
    to configs. A call takes ``adapter_names=[...]``, one name per sample, ``"__base__"`` for none.
    """

    def __init__(self, model: nn.Module, config: Any, adapter_name: str = "default") -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, RandLoraModel) or adapted_layers(model):
            raise ValueError("this model is adapted already: add another adapter with add_adapter()")
        injection.check_name(adapter_name, {})
        plan = config if isinstance(config, injection.Plan) else injection.plan(model, RandLoraConfig.of(config))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model = model
        self.peft_config: dict[str, RandLoraConfig] = {}
        self._active: list[str] = []
        self._add(adapter_name, plan)
        if getattr(model, "is_gradient_checkpointing", False):
            self._require_input_gradients()

    # ---- adding and removing adapters ----

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Add an adapter, initialised as `config` says. It acts once :meth:`set_adapter` names it."""
        injection.check_name(adapter_name, self.peft_config)
        self._add(adapter_name, injection.plan(self.model, RandLoraConfig.of(config)))

    def _add(self, adapter_name: str, plan: injection.Plan) -> None:
        injection.apply(self.model, plan, adapter_name)
        if plan.config.base_model_name_or_path is None:
            plan.config.base_model_name_or_path = getattr(self.model, "name_or_path", None) or None
        self.peft_config[adapter_name] = plan.config
        self.set_adapter(self._active or adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first of the others becomes active."""
        self._check(adapter_name)
        if any(adapter_name in layer.merged_adapters for layer in adapted_layers(self.model).values()):
            raise ValueError(f"adapter {adapter_name!r} is merged: call unmerge_adapter() first")
        left = [name for name in self._active if name != adapter_name]
        others = [name for name in self.peft_config if name != adapter_name]
        self.set_adapter(left or others[:1])
        for layer in adapted_layers(self.model).values():
            if adapter_name in layer.randlora_lambda:
                layer.delete_adapter(adapter_name)
        for module in saved_modules(self.model).values():
            module.modules_to_save.pop(adapter_name) if adapter_name in module.modules_to_save else None
        del self.peft_config[adapter_name]

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
        self.peft_config[adapter_name] = combine.add(self, list(adapters), list(weights), adapter_name)
        self.set_adapter(self._active)

    # ---- which adapters act ----

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of them if there are several (as in PEFT)."""
        return self._active[0] if len(self._active) == 1 else self.active_adapters

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate these adapters, which add up; they become trainable (not with `inference_mode`), others frozen."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(dict.fromkeys(adapter_name))
        for name in names:
            self._check(name)
        saved = saved_modules(self.model)
        for path, module in saved.items():
            if len(several := [name for name in names if name in module.modules_to_save]) > 1:
                raise ValueError(f"{' and '.join(several)} cannot act together: both have a copy of {path!r} to save")
        self._active = names
        for layer in adapted_layers(self.model).values():
            layer.set_adapter([name for name in names if name in layer.randlora_lambda], inference_mode)
        for module in saved.values():
            module.set_adapter(next((name for name in names if name in module.modules_to_save), None), inference_mode)
        if any(config.bias != "none" for config in self.peft_config.values()):
            modes = set() if inference_mode else {self.peft_config[name].bias for name in names}
            injection.train_biases(self.model, modes)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """While this lasts, the model computes as without adapters (trained biases stay); merged ones are unmerged."""
        flags = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        try:
            self._enable(False)
            yield
        finally:
            self._enable(True)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def enable_adapter_layers(self) -> None:
        self._enable(True)

    def disable_adapter_layers(self) -> None:
        self._enable(False)

    def _enable(self, enabled: bool) -> None:
        for layer in adapted_layers(self.model).values():
            layer.enable_adapters(enabled)
        for module in saved_modules(self.model).values():
            module.enabled = enabled
            module.set_adapter(module.active_adapter)

    # ---- merging ----

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Add updates (default: of the active adapters) to the base weights. :meth:`unmerge_adapter` takes them back.

        Raises:
            ValueError: an unknown name; with `safe_merge` a merged weight that is not finite. Nothing is changed then.
        """
        names = (
            self._active
            if adapter_names is None
            else [adapter_names]
            if isinstance(adapter_names, str)
            else adapter_names
        )
        for name in names:
            self._check(name)
        done: list[RandLoraLayer] = []
        try:
            for layer in adapted_layers(self.model).values():
                wanted = [n for n in names if n in layer.randlora_lambda and n not in layer.merged_adapters]
                fresh = not layer.merged
                layer.merge(safe_merge=safe_merge, adapter_names=wanted)
                if fresh and layer.merged:
                    done.append(layer)
        except ValueError:
            for layer in done:
                layer.unmerge()
            raise

    def unmerge_adapter(self) -> None:
        """Give the base weights back, bit for bit."""
        for layer in adapted_layers(self.model).values():
            if layer.merged:
                layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge and return the plain model, without adapters; this object is of no use afterwards."""
        names = self._active if adapter_names is None else list(adapter_names)
        for name in names:
            self._check(name)
        if safe_merge:
            self.merge_adapter(names, safe_merge=True)
        return injection.unload(self.model, names, progressbar)

    def unload(self) -> nn.Module:
        """The model as it was before, without adapters; this object is of no use afterwards."""
        self.unmerge_adapter()
        for module in saved_modules(self.model).values():
            module.set_adapter(None)
        return injection.unload(self.model, [], False)

    # ---- calls ----

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        with self._batch(adapter_names):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's ``generate``, with `adapter_names` as in a call (beams follow their sample)."""
        with self._batch(adapter_names):
            return self.model.generate(*args, **kwargs)

    def _batch(self, adapter_names: Sequence[str] | None):
        if adapter_names is None:
            return contextlib.nullcontext()
        layers = [*adapted_layers(self.model).values(), *saved_modules(self.model).values()]
        return mixed_batch(self.model, layers, adapter_names)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not there yet: copying, unpickling
                raise
            return getattr(self.model, name)

    @property
    def base_model(self) -> RandLoraModel:
        """This object, so that ``model.base_model.model`` is the wrapped model, as in PEFT."""
        return self

    def get_base_model(self) -> nn.Module:
        return self.model

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The wrapped model's, and its inputs require gradients, which reentrant checkpointing needs."""
        self.model.gradient_checkpointing_enable(*args, **kwargs)
        self._require_input_gradients()

    def _require_input_gradients(self) -> None:
        if hasattr(self.model, "enable_input_require_grads"):
            self.model.enable_input_require_grads()

    # ---- counting ----

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; a 4-bit weight counts the numbers that it stands for."""
        trainable = total = 0
        for parameter in self.parameters():
            count = parameter.numel()
            if type(parameter).__name__ == "Params4bit":
                count *= 2 * parameter.element_size()
            total += count
            trainable += count * parameter.requires_grad
        return trainable, total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # ---- files ----

    def save_pretrained(
        self, save_directory: str | os.PathLike, selected_adapters: Sequence[str] | None = None,
        for_peft: bool | None = None,
    ) -> None:  # fmt: skip
        """Write adapters as PEFT does: ``"default"`` into the folder itself, others into folders of their names.

        See :func:`randlora.checkpoint.save`.
        """
        from . import checkpoint

        names = list(self.peft_config) if selected_adapters is None else list(selected_adapters)
        for name in names:
            self._check(name)
        checkpoint.save(self, save_directory, names, for_peft)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, path: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
    ) -> RandLoraModel:
        """`model` with the adapter in the folder `path`, written by randlora or by PEFT (0.15 to 0.21).

        Raises:
            ValueError: a file that cannot be read or does not fit; the model is left as it was.
        """
        from . import checkpoint

        injection.check_name(adapter_name, {})
        if isinstance(model, RandLoraModel) or adapted_layers(model):
            raise ValueError("this model is adapted already: call its load_adapter()")
        loaded = checkpoint.read(model, path)
        self = cls(model, loaded.plan, adapter_name)
        loaded.copy_into(self.model, adapter_name)
        self.set_adapter(adapter_name, inference_mode=not is_trainable)
        return self

    def load_adapter(self, path: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Add the adapter in the folder `path`. It acts once :meth:`set_adapter` names it. Errors as above."""
        from . import checkpoint

        injection.check_name(adapter_name, self.peft_config)
        loaded = checkpoint.read(self.model, path)
        self._add(adapter_name, loaded.plan)
        loaded.copy_into(self.model, adapter_name)

    def _check(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            known = ", ".join(self.peft_config) or "none"
            raise ValueError(f"this model has no adapter named {adapter_name!r}; it has: {known}")
