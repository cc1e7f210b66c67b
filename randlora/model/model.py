"""Whole models: ``get_peft_model(model, config)`` puts adapters on a model of linear layers.

Method names, defaults and behaviour follow PEFT's ``PeftModel`` and ``RandLoraModel``. Unlike there, every adapter has
its own rank, kind, seed, number of bases and bases, and adapters whose bases are equal share them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..config import RandLoraConfig
from ..layers.bypassed import first_calls, forget_calls
from ..layers.mixed_batch import mixed_batch
from ..layers.update_cache import inference_cache
from ..undo import all_or_nothing
from . import forward_signature, injection, weighted_sum
from .active import ActiveAdapters, restore
from .delegation import Delegating
from .injection import adapted_layers, saved_modules


def get_peft_model(model: nn.Module, config: Any, adapter_name: str = "default") -> RandLoraModel:
    """Adapt `model` in place and return it inside a :class:`RandLoraModel` (PEFT: ``get_peft_model``).

    Args:
        config: a :class:`randlora.RandLoraConfig`, PEFT's ``RandLoraConfig`` (its bases are then drawn as PEFT draws
            them), or a dict of their fields.

    Raises:
        TypeError, ValueError: a config that does not fit the model; nothing has been changed then.
    """
    return RandLoraModel(model, config, adapter_name)


class RandLoraModel(Delegating, ActiveAdapters):
    """A model with RandLoRA adapters on its layers; attributes that it lacks are those of the wrapped ``model``.

    Setting and deleting such an attribute does so in ``model``, if it has it and the name does not begin with "_".

    Everything but the adapters (and what their configs train beside them) is frozen. ``peft_config`` maps adapter names
    to configs. A call takes ``adapter_names=[...]``, one name per sample, ``"__base__"`` for none.

    Instances are of a subclass ``RandLoraModel[<class of model>]``, whose ``forward`` has the wrapped model's
    signature: transformers' ``Trainer`` finds the columns, labels and loss arguments of a model by it.
    """

    # transformers asks a quantised model for it before training.
    _hf_peft_config_loaded = True

    def __init__(self, model: nn.Module, config: Any, adapter_name: str = "default") -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if isinstance(model, RandLoraModel) or adapted_layers(model):
            raise ValueError("this model is adapted already: add another adapter with add_adapter()")
        injection.check_name(adapter_name, {})
        plan = config if isinstance(config, injection.Plan) else injection.plan(model, RandLoraConfig.of(config))
        self._init_adapters()  # before there is a model that might have attributes of these names
        self.model = model
        self.__class__ = forward_signature.class_for(type(self), type(model))
        with all_or_nothing(model):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            self._add(adapter_name, plan)
            if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                self._require_input_gradients()

    # ---- adding and removing adapters ----

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Add an adapter, initialised as `config` says. It acts once :meth:`set_adapter` names it.

        Raises:
            TypeError, ValueError: as :func:`get_peft_model`, and for a second adapter with ``bias`` other than
                ``"none"``; nothing has been changed then.
        """
        injection.check_name(adapter_name, self.peft_config)
        plan = injection.plan(self.model, RandLoraConfig.of(config))
        with all_or_nothing(self):
            self._add(adapter_name, plan)

    def _add(self, adapter_name: str, plan: injection.Plan) -> None:
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
            config.base_model_name_or_path = getattr(self.model, "name_or_path", None) or None
        injection.apply(self.model, plan, adapter_name)
        self.peft_config[adapter_name] = config
        if self._active:
            self._set_active(self._active, self._inference_mode)
        else:
            self._set_active([adapter_name], config.inference_mode)
        restore(flags)  # what was there before keeps its trainability
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

    # ---- merging ----

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None,
        low_memory: bool = False,
    ) -> nn.Module:  # fmt: skip
        """Merge and return the plain model, without adapters; this object is of no use afterwards.

        Until all is merged the weights as they were are kept, so that an error, such as one of memory, leaves the model
        as it was. With `low_memory` they are not: what was merged before an error stays merged, outputs are the same,
        and a second call goes on.

        Raises:
            ValueError, TypeError: as :meth:`merge_adapter`.
        """
        injection.check_whole(self)
        return injection.unload(self.model, self._names(adapter_names), progressbar, safe_merge, low_memory)

    def unload(self) -> nn.Module:
        """The model as it was before, without adapters; this object is of no use afterwards."""
        with all_or_nothing(self), self._unmerged():
            return injection.unload(self.model, [])

    # ---- calls ----

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        with self._batch(adapter_names), first_calls(self, self.model):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's ``generate``, with `adapter_names` as in a call (beams follow their sample).

        It runs inside a scope of :func:`randlora.inference_cache`, which says what must not happen meanwhile: nobody
        writes to the parameters in ways that move no version counter. A scope around it decides on the limit.
        """
        with inference_cache(), self._batch(adapter_names), first_calls(self, self.model):
            return self.model.generate(*args, **kwargs)

    def _batch(self, adapter_names: Sequence[str] | None):
        if adapter_names is None:
            return contextlib.nullcontext()
        layers = [*adapted_layers(self.model).values(), *saved_modules(self.model).values()]
        return mixed_batch(self.model, layers, adapter_names)

    @property
    def base_model(self) -> RandLoraModel:
        """This object, so that ``model.base_model.model`` is the wrapped model, as in PEFT."""
        return self

    def get_base_model(self) -> nn.Module:
        return self.model

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return forward_signature.new, (type(self).__bases__[0], type(self.model)), self.__dict__

    def to_empty(self, *, device: Any, recurse: bool = True) -> RandLoraModel:
        """torch's ``to_empty`` for the base model: adapters that have numbers keep them, those on meta get none."""
        parts = [store for layer in adapted_layers(self.model).values() for store in layer.trained_parts()]
        parts += [module.modules_to_save for module in saved_modules(self.model).values()]
        held = [(part, {k: t for k, t in part.state_dict().items() if not t.is_meta}) for part in parts]
        super().to_empty(device=device, recurse=recurse)
        for part, state in held if recurse else ():
            part.load_state_dict(state, strict=False)
        return self

    # ---- gradient checkpointing ----

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """The wrapped model's, and its inputs require gradients, which reentrant checkpointing needs."""
        # transformers' new name first: the old one warns there.
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )
        enable(gradient_checkpointing_kwargs, **kwargs)
        self._require_input_gradients()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """transformers' new name for :meth:`gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

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
        self,
        save_directory: str | os.PathLike,
        selected_adapters: Sequence[str] | None = None,
        for_peft: bool | None = None,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write adapters as PEFT does: ``"default"`` into the folder itself, others into folders of their names.

        See :func:`randlora.checkpoint.save` for `for_peft`, `state_dict` and errors. The others are what transformers,
        PEFT and accelerate hand over.

        Args:
            is_main_process: False: nothing is written, as another process does it.
            state_dict: this model's (``accelerator.get_state_dict(model)``), to take the numbers from.
            save_function: ``accelerator.save`` and the like of torch. transformers calls it for pickles; here there are
                none, and it is not called.
            safe_serialization: only True.

        Raises:
            ValueError: ``safe_serialization=False``, or a `save_function` of another origin, which would not be called.
        """
        from .. import checkpoint

        names = self._names(list(self.peft_config) if selected_adapters is None else selected_adapters)
        checkpoint.check_ways(safe_serialization, save_function)
        if is_main_process:
            checkpoint.save(self, save_directory, names, for_peft, state_dict)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> None:
        """Write the adapters as :meth:`save_pretrained` does and upload them to a repository of the Hugging Face hub.

        Needs ``huggingface_hub`` (ImportError).
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload RandLoRA adapters")

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, path: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
    ) -> RandLoraModel:
        """`model` with the adapter in the folder `path`, written by randlora or by PEFT (0.16 to 0.21).

        A `path` like ``"user/repository"`` that is no folder is fetched from the Hugging Face Hub.

        Raises:
            ValueError: a file that cannot be read or does not fit; the model is left as it was.
        """
        from .. import checkpoint

        injection.check_name(adapter_name, {})
        if isinstance(model, RandLoraModel) or adapted_layers(model):
            raise ValueError("this model is adapted already: call its load_adapter()")
        loaded = checkpoint.read(model, path)
        loaded.plan.config.inference_mode = not is_trainable
        with all_or_nothing(model, values=loaded.overwritten(model)):
            self = cls(model, loaded.plan, adapter_name)
            loaded.copy_into(self.model, adapter_name)
            return self if is_trainable else self.eval()

    def load_adapter(self, path: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Add the adapter in the folder `path`. It acts once :meth:`set_adapter` names it. Errors as above.

        `is_trainable` is for a model without active adapters, where it acts at once; else :meth:`set_adapter` decides.
        """
        from .. import checkpoint

        injection.check_name(adapter_name, self.peft_config)
        loaded = checkpoint.read(self.model, path)
        loaded.plan.config.inference_mode = not is_trainable
        with all_or_nothing(self, values=loaded.overwritten(self.model)):
            self._add(adapter_name, loaded.plan)
            loaded.copy_into(self.model, adapter_name)
