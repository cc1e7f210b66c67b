"""Loads `randlora._C`, and says what to do where that cannot work.

The binary fits the torch it was built against. With another one it may fail to load, or load and crash later, so the
versions are compared first; the build leaves them beside the binary in `_build.json`.
"""

from __future__ import annotations

import importlib
import json
import platform
from importlib import metadata
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlparse

BUILD_RECORD = Path(__file__).with_name("_build.json")


def load(record_path: Path = BUILD_RECORD) -> ModuleType:
    """Import the compiled module, or raise an ImportError that names the cause and the cure."""
    try:
        import torch
    except ImportError as error:
        raise ImportError("randlora needs PyTorch 2.10 or newer, which cannot be imported: install torch.") from error

    installed = f"torch {torch.__version__}"
    package = record_path.parent
    try:
        record = json.loads(record_path.read_text())
        built = f"torch {record['torch']}"
    except FileNotFoundError as error:
        raise ImportError(
            f"randlora has no compiled part in {package}: it was built against no torch yet, and {installed} is "
            f"installed. {_cure(package)}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ImportError(
            f"{record_path} does not say which torch randlora was built against; {installed} is installed. "
            f"{_cure(package)}"
        ) from error

    if _minor(record["torch"]) != _minor(torch.__version__):
        raise ImportError(f"randlora was built against {built}, but {installed} is installed. {_cure(package)}")
    try:
        return importlib.import_module("randlora._C")
    except ImportError as error:
        raise ImportError(
            f"randlora's compiled part does not load ({error}). It was built against {built} for Python "
            f"{record.get('python')}; {installed} and Python {platform.python_version()} are installed. "
            f"{_cure(package)}"
        ) from error


def _minor(version: str) -> list[str]:
    return str(version).split(".")[:2]


def _cure(package: Path) -> str:
    """The command that builds the binary anew for the installed torch."""
    install = "pip install --force-reinstall --no-deps"
    if (package.parent / "csrc" / "sources.txt").is_file():
        # An editable install, or Python was started in the checkout: either way the binary belongs into it.
        return f"To build it, type: {install} -e {package.parent}"
    source = _installed_from()
    if source is not None:
        return f"To build it anew, type: {install} {source}"
    return f"To build it anew, type: {install} --no-cache-dir randlora  (or . instead of randlora in its source folder)"


def _installed_from() -> Path | None:
    """The source folder pip installed this package from, if it is still there."""
    try:
        text = metadata.distribution("randlora").read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return None
    url = urlparse(json.loads(text).get("url", "")) if text else None
    folder = Path(unquote(url.path)) if url and url.scheme == "file" else None
    return folder if folder and (folder / "setup.py").is_file() else None
