"""What both directions share: names, our part of the metadata, and writing a file as a whole."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..config import CONFIG_NAME, RandLoraConfig

WEIGHTS_NAME = "adapter_model.safetensors"
FORMAT = 1
PREFIX = "base_model.model."
PROJECTIONS = ("randlora_A", "randlora_B")
PARAMETERS = ("randlora_lambda", "randlora_gamma")
# Settings that PEFT does not know and would complain about in the JSON: they travel in the metadata.
OWN_SETTINGS = ("num_bases", "prng", "strategy", "kind", "sparsity")


def read_config(folder: Path) -> RandLoraConfig:
    path = folder / CONFIG_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"a JSON object was expected, got {type(values).__name__}")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error
    weights = folder / WEIGHTS_NAME
    if weights.exists():
        described = describe(weights, read_metadata(weights))
        # Without metadata PEFT wrote it, and drew the bases.
        settings = {"prng": "peft"} if described is None else dict(described["settings"])
        if settings.get("prng") == "none":  # bases that came from a file, and are in this one
            settings["prng"] = "philox"
        values = {**values, **settings}
    try:
        return RandLoraConfig.from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: no readable safetensors file: {error}") from error


def describe(path: Path, metadata: dict[str, str]) -> dict[str, Any] | None:
    """Our part of the metadata; None if there is none, as in PEFT's files."""
    if "randlora" not in metadata:
        return None
    try:
        found = json.loads(metadata["randlora"])
        version = found["format"]
        if isinstance(version, int) and version > FORMAT:
            raise ValueError(f"format {version}, of a newer randlora; this one reads up to {FORMAT}: update it")
        valid = (
            version == FORMAT
            and isinstance(found["settings"], dict)
            and set(found["settings"]) == set(OWN_SETTINGS)
            and isinstance(found["fingerprint"], str)
            and all(isinstance(v, int) for v in (found["r"], found["seed"], *found["dims"]))
            and len(found["dims"]) == 3
        )
    except (KeyError, TypeError, json.JSONDecodeError):
        valid = False
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not valid:
        raise ValueError(f"{path}: its metadata is damaged: {metadata['randlora'][:200]!r}")
    return found


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """``write(temporary file)``, then rename: a crash leaves the old file or the new one, never half of one."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):  # of a process that was killed here
        with contextlib.suppress(OSError):
            stale.unlink()
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(descriptor)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0o600 is for secrets
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
