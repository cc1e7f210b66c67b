"""Whole models: ``get_peft_model(model, config)`` puts adapters on a model of linear layers.

Method names, defaults and behaviour follow PEFT's ``PeftModel`` and ``RandLoraModel``. Unlike there, every adapter has
its own rank, kind, seed, number of bases and bases, and adapters whose bases are equal share them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import reading
from ..config import RandLoraConfig
from ..distributed import zero3
from ..layers.bypassed import first_calls
from ..layers.mixed_batch import Mixable, mixed_batch
from ..layers.update_cache import inference_cache
from ..undo import all_or_nothing
from . import forward_signature, injection
from .adapter_plan import Plan, plan_adapter
from .delegation import Delegating
from .files import SavedAdapters
from .merged_tensors import merged_tensors
from .parts import adapted_layers, saved_modules
from .training_step import at_training_step


def get_peft_model(model: nn.Module, config: Any, adapter_name: str = "default") -> RandLoraModel:
    """Adapt `model` in place and return it inside a :class:`RandLoraModel` (PEFT: ``get_peft_model``).

    Args:
        config: a :class:`randlora.RandLoraConfig`, PEFT's ``RandLoraConfig`` (its bases are then drawn as PEFT draws
            them), or a dict of their fields.

    Raises:
        TypeError, ValueError: a config that does not fit the model; nothing has been changed then.
    """
    return RandLoraModel(model, config, adapter_name)


class RandLoraModel(Delegating, SavedAdapters):
    """A model with RandLoRA adapters on its layers; attributes that it lacks are those of the wrapped ``model``.

    Setting or deleting such an attribute changes ``model``, if that has it and the name does not begin with "_".

    Everything but the adapters (and what their configs train beside them) is frozen. ``peft_config`` maps adapter names
    to configs. A call takes ``adapter_names=[...]``, one name per sample, ``"__base__"`` for none.

    Instances are of a subclass ``RandLoraModel[<class of model>]``, whose ``forward`` has the wrapped model's
    signature: transformers' ``Trainer`` finds the columns, labels and loss arguments of a model by it.
    """

    # transformers trains a quantised model only if it has this.
    _hf_peft_config_loaded = True

    def __new__(cls, model: Any = None, *_: Any, **__: Any) -> RandLoraModel:
        """An instance of the subclass for models of this class (:mod:`randlora.model.forward_signature`)."""
        return super().__new__(forward_signature.class_for(cls, type(model)) if isinstance(model, nn.Module) else cls)

    def __init__(self, model: nn.Module, config: Any, adapter_name: str = "default") -> None:
        _check_first(model, adapter_name)
        self._wrap(model, plan_adapter(model, RandLoraConfig.of(config)), adapter_name)

    @classmethod
    def from_plan(cls, model: nn.Module, plan: Plan, adapter_name: str = "default") -> RandLoraModel:
        """`model` with the adapter of `plan`, which :func:`randlora.model.adapter_plan.plan_adapter` made for it."""
        _check_first(model, adapter_name)
        self = cls.__new__(cls, model)
        self._wrap(model, plan, adapter_name)
        return self

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, path: str | os.PathLike, adapter_name: str = "default", is_trainable: bool = False
    ) -> RandLoraModel:
        """`model` with the adapter in the folder `path`, written by randlora or by PEFT (0.16 to 0.21).

        A `path` like ``"user/repository"`` that is no folder is fetched from the Hugging Face Hub.

        Raises:
            ValueError: a file that cannot be read or does not fit; the model is left as it was.
        """
        injection.check_name(adapter_name, {})
        if isinstance(model, RandLoraModel) or adapted_layers(model):
            raise ValueError("this model is adapted already: call its load_adapter()")
        loaded = reading.read(model, path, is_trainable)
        with all_or_nothing(model, values=loaded.overwritten(model)):
            self = cls.from_plan(model, loaded.plan, adapter_name)
            loaded.copy_into(self.model, adapter_name)
            return self if is_trainable else self.eval()

    def _wrap(self, model: nn.Module, plan: Plan, adapter_name: str) -> None:
        super().__init__()
        self._init_adapters()  # before there is a model that might have attributes of these names
        self.model = model
        with all_or_nothing(model):
            for parameter in model.parameters():
                parameter.requires_grad_(False)
            self._add(adapter_name, plan)
            if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
                self._require_input_gradients()

    # ---- merging ----

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None,
        low_memory: bool = False,
    ) -> nn.Module:  # fmt: skip
        """Merge and return the plain model, without adapters; this object is of no use afterwards.

        The original weights are kept until all layers are merged, so that an error, such as too little memory, leaves
        the model as it was. With `low_memory` they are not kept: the layers that were merged before an error stay
        merged, the model's outputs are the same, and a second call goes on from there.

        Raises:
            ValueError, TypeError: as :meth:`merge_adapter`.
        """
        return injection.unload(self.model, self._names(adapter_names), progressbar, safe_merge, low_memory)

    def merged_tensors(
        self, adapter_names: Sequence[str] | None = None, *, safe_merge: bool = False,
        dequantize: bool | torch.dtype = False, original_names: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
        """Names and tensors of the merged plain model, one after the other; this model does not change.

        ``dict(model.merged_tensors())`` is the state dict of ``copy.deepcopy(model).merge_and_unload()``: the same
        names, order, shapes, dtypes and bits. Each merged weight is made when it is asked for, and not kept; all
        others are the model's own, detached and not copied. So a loop has two merged weights at a time at most, its own
        and the next, or one if it deletes its own before.

        Weights that accelerate offloads are brought in. Those of which processes hold parts (FSDP2, tensor parallel,
        ZeRO-3) come whole: all processes must take all tensors, in this order.

        Args:
            adapter_names: default: the active ones.
            safe_merge: raise ``ValueError`` instead of a merged weight that is not finite.
            dequantize: for models with quantised layers, whose weights are given as numbers, under their plain names
                and with the updates added: in this dtype, or with True in the model's.
            original_names: names and shapes of the files of the Hugging Face hub instead, which servers read: what
                transformers' ``save_pretrained`` writes. Of fused experts these are the weights of every single one;
                what several modules share, as tied embeddings, comes once, under its first name.

        Raises:
            ValueError, TypeError: as :meth:`merge_and_unload` before the first tensor, though not for sharded models.
                ValueError for quantised layers without `dequantize`, and for tensors without numbers.
        """
        return merged_tensors(self.model, self._names(adapter_names), safe_merge, dequantize, original_names)

    def unload(self) -> nn.Module:
        """The model as it was before, without adapters; this object is of no use afterwards."""
        with all_or_nothing(self), self._unmerged():
            return injection.unload(self.model, [])

    # ---- calls ----

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        at_training_step(self)
        with self._batch(adapter_names), first_calls(self, self.model):
            return self.model(*args, **kwargs)

    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The wrapped model's ``generate``, with `adapter_names` as in a call (beams follow their sample).

        It runs inside a scope of :func:`randlora.inference_cache`: meanwhile nobody may write to parameters in ways
        that PyTorch's version counters do not see. A scope that is open around the call sets the limit.
        """
        with inference_cache(), self._batch(adapter_names), first_calls(self, self.model):
            model: Any = self.model
            return model.generate(*args, **kwargs)

    def _batch(self, adapter_names: Sequence[str] | None) -> contextlib.AbstractContextManager[None]:
        if adapter_names is None:
            return contextlib.nullcontext()
        parts: list[Mixable] = [*adapted_layers(self.model).values(), *saved_modules(self.model).values()]
        return mixed_batch(self.model, parts, adapter_names)

    @property
    def base_model(self) -> RandLoraModel:
        """This object, so that ``model.base_model.model`` is the wrapped model, as in PEFT."""
        return self

    def get_base_model(self) -> nn.Module:
        return self.model

    def _get_name(self) -> str:
        """The wrapped model's name, by which transformers' Trainer knows whether to shift labels that it smooths."""
        return str(self.model._get_name())

    def __repr__(self) -> str:
        return type(self).__name__ + super().__repr__().removeprefix(self._get_name())

    def __reduce_ex__(self, protocol: Any) -> tuple:
        return forward_signature.new, (type(self).__bases__[0], type(self.model)), self.__dict__

    def to_empty(self, *, device: Any, recurse: bool = True) -> RandLoraModel:
        """torch's ``to_empty`` for the base model: adapters keep the numbers that they have.

        Those on the meta device, which have none, get the ones that they are initialised with, the same on all ranks:
        lambda zero and gamma ``1 / max(num_bases, min_dim)``, or what ``randlora_alpha="auto"`` gave it, also where a
        config says ``init_weights=False``.
        """
        layers = adapted_layers(self.model).values()
        parts: list[nn.Module] = [store for layer in layers for store in layer.trained_parts()]
        parts += [module.modules_to_save for module in saved_modules(self.model).values()]
        held = [(part, {k: t for k, t in part.state_dict().items() if not t.is_meta}) for part in parts]
        empty = [
            (layer, name)
            for layer in layers
            for name in layer.randlora_lambda
            if any(parameters[name].is_meta for parameters in layer.trained_parts())
        ]
        super().to_empty(device=device, recurse=recurse)
        if recurse:
            for layer, name in empty:
                layer.reset_randlora_parameters(name)
            for part, state in held:
                part.load_state_dict(state, strict=False)
        return self

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's.

        Raises:
            ValueError: adapters act on the embeddings or the output head, or hold copies of them: those would be lost.
        """
        model: Any = self.model
        modules = [model.get_input_embeddings(), model.get_output_embeddings()]
        parts = adapted_layers(model) | saved_modules(model)
        if found := [path for path, part in parts.items() if any(part is module for module in modules)]:
            raise ValueError(
                f"resize_token_embeddings: {' and '.join(found)} would lose what adapters have there. Resize the model "
                "before it is adapted"
            )
        return model.resize_token_embeddings(*args, **kwargs)

    # ---- gradient checkpointing ----

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **kwargs: Any) -> None:
        """Switch it on in the wrapped model, and let its inputs require gradients, as reentrant checkpointing needs."""
        # transformers' new name first: the old one warns there.
        model: Any = self.model
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs, **kwargs)
        self._require_input_gradients()

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, **kwargs: Any
    ) -> None:
        """transformers' new name for :meth:`gradient_checkpointing_enable`."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)

    def _require_input_gradients(self) -> None:
        model: Any = self.model
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()

    # ---- counting ----

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; a 4-bit weight counts the numbers that it stands for."""
        trainable = total = 0
        for parameter in self.parameters():
            count = zero3.shape_of(parameter).numel()
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


def _check_first(model: Any, adapter_name: str) -> None:
    """Raises ``TypeError`` or ``ValueError`` for what cannot be given a first adapter of this name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, RandLoraModel) or adapted_layers(model):
        raise ValueError("this model is adapted already: add another adapter with add_adapter()")
    injection.check_name(adapter_name, {})
