"""The part of ``RandLoraModel`` that writes its adapters into files and reads them from there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ..checkpoint import reading, writing
from ..undo import all_or_nothing
from . import injection
from .adapters import Adapters


class SavedAdapters(Adapters):
    """Base class of :class:`randlora.RandLoraModel`, which documents it."""

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

        See :func:`randlora.checkpoint.writing.save` for `for_peft`, `state_dict` and errors. The others are what
        transformers, PEFT and accelerate hand over.

        Args:
            is_main_process: False: nothing is written, as another process does it. Where processes hold parts of what
                is saved (FSDP2), all of them must make this call, and the first one writes.
            state_dict: this model's (``accelerator.get_state_dict(model)``), to take the numbers from.
            save_function: ``accelerator.save`` and the like of torch. transformers calls it for pickles; here there are
                none, and it is not called.
            safe_serialization: only True.

        Raises:
            ValueError: ``safe_serialization=False``, or a `save_function` of another origin, which would not be called.
        """
        names = self._names(list(self.peft_config) if selected_adapters is None else selected_adapters)
        writing.check_options(safe_serialization, save_function)
        writing.save(self, save_directory, names, for_peft, state_dict, is_main_process)

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> None:
        """Write the adapters as :meth:`save_pretrained` does and upload them to a repository of the Hugging Face hub.

        Where processes hold parts of what is saved, all of them call this, and the one that writes uploads. Needs
        ``huggingface_hub`` (ImportError).
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if not os.listdir(folder):
                return  # another process has written
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload RandLoRA adapters")

    def load_adapter(self, path: str | os.PathLike, adapter_name: str, is_trainable: bool = False) -> None:
        """Add the adapter in the folder `path`. It acts once :meth:`set_adapter` names it.

        Errors are those of :meth:`randlora.RandLoraModel.from_pretrained`. `is_trainable` is for a model without active
        adapters, where the new one acts at once; else :meth:`set_adapter` decides.
        """
        injection.check_name(adapter_name, self.peft_config)
        loaded = reading.read(self.model, path, is_trainable)
        with all_or_nothing(self, values=loaded.overwritten(self.model)):
            self._add(adapter_name, loaded.plan)
            loaded.copy_into(self.model, adapter_name)
