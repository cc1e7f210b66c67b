"""transformers' ``Trainer`` around :class:`randlora.RandLoraModel`: its checkpoints hold adapters, not the base model.

transformers asks a model to save and load itself if it is one of its own classes or PEFT's (``isinstance``), and writes
the whole state dict of any other; there is no setting for it, callbacks come too late for saving and for resuming, and
a model cannot tell a checkpoint from other uses of its state dict. What transformers documents is to derive from its
Trainer, and that is done here. To be an instance of ``PeftModel`` would reach the plain Trainer, too, but only where
PEFT is installed, and it would change more than checkpoints: of several adapters the first one alone is read back, FSDP
gets PEFT's way of wrapping in place of the configured one, and all methods of ``PeftModel`` would be there, of which
many need insides that this model has not. A plain Trainer that writes the base model says so with a warning.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from accelerate.utils import save_fsdp_optimizer
from torch import Tensor, nn
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from ..checkpoint.hub import copy_adapters
from ..checkpoint.restoring import holds_adapters, restore
from ..model.model import RandLoraModel

_Trainer: Any = object  # what AdapterCheckpoints calls of its base class is transformers'

__all__ = ["AdapterCheckpoints", "Trainer"]


class AdapterCheckpoints(_Trainer):
    """To derive from before a Trainer of transformers: ``class T(AdapterCheckpoints, Seq2SeqTrainer): ...``

    With a model of randlora, ``save_model`` and checkpoints write what ``save_pretrained`` does: the adapters, what
    they train beside them, and a model card. Resuming and ``load_best_model_at_end`` read it back into the same
    parameters. A checkpoint that holds the whole state dict, as a plain Trainer writes it, still resumes.
    ``push_to_hub`` uploads the adapters. With any other model nothing is changed.

    Raises:
        ValueError: on resuming from adapters that are not those of the model, before anything of it is changed.
        TypeError: where a class is made that names it behind the Trainer, whose methods it would not replace.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if transformers.Trainer in order[: order.index(AdapterCheckpoints)]:
            mixin = next(c.__name__ for c in order[1:] if issubclass(c, AdapterCheckpoints))
            trainer = next(c.__name__ for c in order[1:] if issubclass(c, transformers.Trainer))
            raise TypeError(f"{mixin} must come before the trainer: class {cls.__name__}({mixin}, {trainer})")

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        model = self._adapted(self.model)
        if model is None:
            super()._save(output_dir, state_dict)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        model.save_pretrained(folder, state_dict=state_dict, is_main_process=self.args.should_save)
        if self.args.should_save:
            processor = self.processing_class
            if processor is None:
                processor = getattr(self.data_collator, "tokenizer", None)
            if processor is not None:
                processor.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled or self._adapted(self.model) is None:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)  # transformers would put the whole model together first
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled or self._adapted(self.model) is None:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        # transformers would write the whole model once more.
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapted = self._adapted(self.model if model is None else model)
        if adapted is None or not holds_adapters(adapted, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            restore(adapted, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        adapted = self._adapted(self.model)
        if adapted is None or not holds_adapters(adapted, self.state.best_model_checkpoint):
            super()._load_best_model()
        else:
            restore(adapted, self.state.best_model_checkpoint)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)  # as for a model of its own, in place of what is there
        model = self._adapted(self.model)
        if model is not None and self.is_world_process_zero():
            model.create_or_update_model_card(self.args.output_dir, self.hub_model_id)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        model = self._adapted(self.model)
        if model is not None and self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END:
            # transformers knows one adapter, and that only where PEFT is installed.
            copy_adapters(checkpoint_folder, self.args.output_dir, model.peft_config)
            model.create_or_update_model_card(self.args.output_dir, self.hub_model_id)
        super()._push_from_checkpoint(checkpoint_folder)

    def _adapted(self, model: nn.Module) -> RandLoraModel | None:
        """The model of randlora in what the Trainer has wrapped around it, or None for any other."""
        model = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        return model if isinstance(model, RandLoraModel) else None


class Trainer(AdapterCheckpoints, transformers.Trainer):
    """transformers' ``Trainer`` with :class:`AdapterCheckpoints`."""
