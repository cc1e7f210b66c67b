"""The part of ``RandLoraModel`` that writes its adapters into files and reads them from there."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import card, hub, reading, restoring, writing
from ..undo import all_or_nothing
from . import injection, written_whole
from .adapters import Adapters


class SavedAdapters(Adapters):
    """Base class of :class:`randlora.RandLoraModel`, which documents it."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """torch's: all of the model. A plain ``transformers.Trainer`` that asks for a checkpoint gets a warning."""
        written_whole.warn_if_so()
        return super().state_dict(*args, **kwargs)

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
        save_embedding_layers: bool | str = "auto",
        path_initial_model_for_weight_conversion: str | None = None,
        max_shard_size: int | str | None = None,
        variant: str | None = None,
        save_peft_format: bool = True,
        save_original_format: bool = True,
        token: str | bool | None = None,
        push_to_hub: bool = False,
        **upload: Any,
    ) -> None:
        """Write adapters as PEFT does: ``"default"`` into the folder itself, others into folders of their names.

        Beside them goes a model card, ``README.md`` (:meth:`create_or_update_model_card`).

        See :func:`randlora.checkpoint.writing.save` for `for_peft`, `state_dict` and errors. The others are what
        transformers, PEFT and accelerate hand over.

        Args:
            is_main_process: False: nothing is written, as another process does it. Where processes hold parts of what
                is saved (FSDP2), all of them must make this call, and the first one writes.
            state_dict: this model's (``accelerator.get_state_dict(model)``), to take the numbers from.
            save_function: ``accelerator.save`` and the like of torch. transformers calls it for pickles; here there are
                none, and it is not called.
            safe_serialization: only True.
            save_embedding_layers: ``"auto"`` or False: what is trained is saved, and nothing else.
            path_initial_model_for_weight_conversion, variant: only None.
            max_shard_size, save_peft_format, save_original_format, token: as transformers hands them over; they change
                nothing, as an adapter is one file, in PEFT's format, and only uploading needs a token.
            push_to_hub: upload the same adapters afterwards, by :meth:`push_to_hub`, which gets `upload`; the
                repository is ``repo_id``, by default one with the folder's name.

        Raises:
            TypeError: `selected_adapters` is no list of names (PEFT's second argument is another one), or an argument
                that nobody knows.
            ValueError: what is said above to be refused, with what to do.
        """
        if isinstance(selected_adapters, bool):
            raise TypeError(
                "selected_adapters must be a list of names, got a bool: give safe_serialization by its name"
            )
        if unknown := sorted(set(upload) - (hub.OPTIONS if push_to_hub else set())):
            raise TypeError(
                f"save_pretrained() does not know {', '.join(unknown)}"
                + ("" if push_to_hub or not set(unknown) <= hub.OPTIONS else ", unless push_to_hub=True")
            )
        names = self._names(list(self.peft_config) if selected_adapters is None else selected_adapters)
        writing.check_options(
            safe_serialization,
            save_function,
            save_embedding_layers,
            {"path_initial_model_for_weight_conversion": path_initial_model_for_weight_conversion, "variant": variant},
        )
        if writing.save(self, save_directory, names, for_peft, state_dict, is_main_process) and push_to_hub:
            repo_id = upload.pop("repo_id", None) or Path(save_directory).resolve().name
            with tempfile.TemporaryDirectory() as folder:  # the card in `save_directory` stays as it is
                hub.copy_adapters(save_directory, folder, names)
                hub.upload(self, folder, repo_id, token=token, **upload)

    def push_to_hub(
        self,
        repo_id: str,
        private: bool | None = None,
        token: str | bool | None = None,
        *,
        max_shard_size: int | str | None = None,
        safe_serialization: bool = True,
        **upload: Any,
    ) -> Any:
        """Write the adapters as :meth:`save_pretrained` does and upload them to a repository of the Hugging Face hub.

        A ``README.md`` that the repository has keeps its text; only its front matter is brought up to date.

        Where processes hold parts of what is saved, all of them call this, and the one that writes uploads. Needs
        ``huggingface_hub`` (ImportError).

        Args:
            max_shard_size, safe_serialization: as :meth:`save_pretrained`.
            upload: ``commit_message``, ``commit_description``, ``revision`` (a branch, made if it is missing),
                ``create_pr``, ``tags`` (for the model card).

        Returns:
            What ``HfApi.upload_folder`` returns, or None where another process has uploaded.
        """
        if unknown := sorted(set(upload) - hub.OPTIONS):
            raise TypeError(f"push_to_hub() does not know {', '.join(unknown)}")
        writing.check_options(safe_serialization)
        with tempfile.TemporaryDirectory() as folder:
            if not writing.save(self, folder, list(self.peft_config)):
                return None
            return hub.upload(self, folder, repo_id, private=private, token=token, **upload)

    def create_or_update_model_card(
        self, output_dir: str | os.PathLike, repo_id: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        """Write the model card ``README.md`` for the adapters in `output_dir`, or bring its front matter up to date.

        In the form of PEFT's: ``library_name`` (``peft`` where PEFT reads the files, else ``randlora``), ``base_model``
        where that is a repository, and tags, beside those that are there. All other text of an existing card stays; how
        to load the adapters is added where it does not say so, and follows the files where it is as it was written.

        Args:
            repo_id: the repository of the Hub that the folder is for, to load them from; else that is ``"."``.
        """
        card.write(self, Path(output_dir), repo_id, tags)

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

    def hotswap(self, path: str | os.PathLike, adapter_name: str = "default") -> None:
        """Replace the numbers of an adapter by those in the folder `path`, in place.

        For a server that changes adapters: no module, parameter or graph is made anew. All tensors stay where they are,
        so that compiled models run the same code, without compiling again, and captured CUDA graphs compute with the
        new numbers. Written are lambda and gamma, the adapter's copies of ``modules_to_save``, and trained biases.

        The file may be PEFT's, or ``"user/repository"`` of the Hub. It must have the same layers, rank, numbers of
        bases and bases. With another ``randlora_alpha`` its lambda is multiplied by what the two differ by, rounded
        once to the parameter's dtype (exact where that is a power of two): the adapter keeps its own alpha, as all of
        its other settings, dropout included. Saved afterwards it is the adapter in `path`.

        What was trained before is lost: gradients and the state of an optimizer are of the old numbers. Whether
        parameters require gradients does not change. Where processes hold parts of the adapter (FSDP2), all of them
        make this call. An adapter that was offloaded together with the model is in memory afterwards.

        Raises:
            ValueError: an unknown name; an adapter that is merged, or on the meta device; a file that is missing or
                damaged, that is of other layers, rank, bases or modules to save, or trains other biases. The message
                names the file, what differs, and what to do. Nothing is changed then, or if copying fails.
        """
        self._check(adapter_name)
        restoring.hotswap(self, path, adapter_name)
