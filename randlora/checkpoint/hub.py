"""Where an adapter is: a folder, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .layout import CONFIG_NAME, WEIGHTS_NAME


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
