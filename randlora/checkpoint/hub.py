"""Where an adapter is, a folder or a repository of the Hugging Face Hub, and how it gets into a repository."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import card
from .layout import CONFIG_NAME, WEIGHTS_NAME, folder_of

if TYPE_CHECKING:
    from ..model.adapters import Adapters

# What can be said about an upload.
OPTIONS = {"repo_id", "private", "commit_message", "commit_description", "revision", "create_pr", "tags"}


def find_folder(path: str | os.PathLike) -> Path:
    """`path` if it is a folder; else, if it is a string like ``"user/repository"``, the folder of that one's snapshot.

    Raises:
        ValueError: neither is there (or huggingface_hub is not installed, or the network cannot be reached).
    """
    folder = Path(path)
    try:
        if folder.is_dir():
            return folder
        if folder.exists():
            raise ValueError(f"{folder} is a file: the adapter's folder was expected")
    except OSError as error:
        raise ValueError(f"{folder}: cannot be read: {error.strerror}") from error
    if not isinstance(path, str) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", path):
        raise ValueError(f"{folder}: there is no such folder")
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ValueError(
            f"{folder}: there is no such folder, and repositories of the Hugging Face Hub need "
            "pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(path, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except Exception as error:  # of huggingface_hub's HTTP library, another one in every major version
        raise ValueError(
            f"{folder}: there is no such folder, and no repository {path!r} could be fetched from the Hugging Face "
            f"Hub: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}"
        ) from error


def copy_adapters(folder: str | os.PathLike, into: str | os.PathLike, names: Iterable[str]) -> None:
    """Copy the files of the adapters `names`, and the model card, from one folder of a model to another."""
    for name in names:
        folder_of(into, name).mkdir(exist_ok=True)
        for file in (CONFIG_NAME, WEIGHTS_NAME):
            shutil.copyfile(folder_of(folder, name) / file, folder_of(into, name) / file)
    if (Path(folder) / card.CARD_NAME).is_file():
        shutil.copyfile(Path(folder) / card.CARD_NAME, Path(into) / card.CARD_NAME)


def upload(
    model: Adapters,
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload RandLoRA adapters",
    commit_description: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: Iterable[str] | None = None,
) -> Any:
    """Upload the adapters in `folder`, with a card for the repository; returns what ``upload_folder`` does."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    if api.file_exists(repo_id, card.CARD_NAME, revision=revision):
        shutil.copyfile(api.hf_hub_download(repo_id, card.CARD_NAME, revision=revision), Path(folder) / card.CARD_NAME)
    card.write(model, Path(folder), repo_id, tags or ())
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=commit_message,
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
