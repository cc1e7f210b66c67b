"""What writing and reading share: names in the files, our part of the metadata, the settings in both files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..dtypes import FLOATS
from .opening import OpenFile
from .replace import is_replacing

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# The only key of the metadata: safetensors writes several in random order, and equal adapters should be equal files.
METADATA_KEY = "randlora"
FORMAT = 1
PEFT_TYPE = "RANDLORA"
# What PEFT would misread carries another type, so that PEFT refuses it.
OWN_PEFT_TYPE = "RANDLORA_PHILOX"
PREFIX = "base_model.model."
BASES = ("randlora_A", "randlora_B")  # PEFT calls them projections
PARAMETERS = ("randlora_lambda", "randlora_gamma")
# Settings that PEFT does not know and would complain about in the JSON: they are in the metadata only.
OWN_SETTINGS = ("num_bases", "prng", "strategy", "kind", "sparsity", "group_width", "target_parameters")
# What the numbers depend on: where both files say it, they must say the same.
NUMBERS = (
    "r",
    "randlora_alpha",
    "projection_prng_key",
    "sparse",
    "very_sparse",
    "num_bases",
    "prng",
    "kind",
    "sparsity",
    "group_width",
)
LONGEST_CONFIG = 16 << 20  # bytes; the names of 100,000 layers
_ATTEMPTS = 100
# What a damaged file makes of the libraries that read it.
DAMAGE = (SafetensorError, OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError, RuntimeError)


def folder_of(folder: str | os.PathLike, adapter_name: str) -> Path:
    """Where an adapter's files are in the `folder` of a model: ``"default"`` in itself, others in one of their name."""
    return Path(folder) if adapter_name == "default" else Path(folder) / adapter_name


def settings_of(folder: Path, described: dict[str, Any] | None, given: dict[str, Any] | None) -> dict[str, Any]:
    """An adapter's settings, from what ``adapter_config.json`` says, `given`, and what the weights' metadata says.

    Raises:
        ValueError: neither says it, or they contradict each other.
    """
    path = folder / CONFIG_NAME
    if given is None and described is not None:
        # Saving was interrupted, or the file is not wanted: the metadata is complete.
        config: dict[str, Any] = described["config"]
        return config
    if given is None:
        raise ValueError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}")
    if described is None:
        if given.get("peft_type") == OWN_PEFT_TYPE and os.path.lexists(folder / WEIGHTS_NAME):
            raise ValueError(
                f"{folder / WEIGHTS_NAME} has lost the metadata that its bases are made from (was it written anew "
                "by another program?)"
            )
        return {"prng": "peft"} | given  # PEFT wrote it, and drew the bases
    own: dict[str, Any] = described["config"]
    for name in NUMBERS:
        if name in given and given[name] != own.get(name):
            raise ValueError(
                f"{path} says {name}={given[name]!r}, but {WEIGHTS_NAME} beside it was saved with "
                f"{name}={own.get(name)!r}: they do not belong together (without {CONFIG_NAME} the latter is taken)"
            )
    return own | given


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        values = json.loads(text.decode())
        if not isinstance(values, dict):
            raise ValueError(f"a JSON object was expected, got {type(values).__name__}")
        return values
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from error


# ---- the two files ----


@contextlib.contextmanager
def open_adapter(folder: Path) -> Iterator[tuple[Any, dict[str, Any] | None, dict[str, Any] | None]]:
    """The open weights, what their metadata says, and what the config says; None for what is not there.

    While another process saves into the folder, these are the two files of one save: if one was replaced before both
    were open, both are opened again.

    Raises:
        ValueError: a file that is damaged, too large or no regular file, or that changes all the time.
    """
    weights_path, config_path = folder / WEIGHTS_NAME, folder / CONFIG_NAME
    for attempt in range(_ATTEMPTS):
        with contextlib.ExitStack() as stack:
            weights, config = (OpenFile.if_there(path, stack) for path in (weights_path, config_path))
            text = None if config is None else config.read(LONGEST_CONFIG)
            if not all(
                not os.path.lexists(path) if file is None else file.is_current()
                for path, file in ((weights_path, weights), (config_path, config))
            ):
                continue
            file = described = None
            if weights is not None:
                file, described = stack.enter_context(_parsed(weights))
            if described is None and config is None and is_replacing(folder) and attempt < _ATTEMPTS - 1:
                time.sleep(0.01)  # the moment between PEFT's files and ours
                continue
            yield file, described, None if text is None else _parse(config_path, text)
            return
    raise ValueError(f"{folder}: its files are replaced all the time: a pair that belongs together could not be read")


def read_given(folder: Path) -> dict[str, Any] | None:
    """What ``adapter_config.json`` says, or None if there is none."""
    with contextlib.ExitStack() as stack:
        config = OpenFile.if_there(folder / CONFIG_NAME, stack)
        return None if config is None else _parse(config.path, config.read(LONGEST_CONFIG))


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[tuple[OpenFile, Any, dict[str, Any] | None]]:
    """Weights alone: the file, what safetensors makes of it, and what its metadata says. Raises ``ValueError``."""
    with OpenFile(path) as weights, _parsed(weights) as (file, described):
        yield weights, file, described


@contextlib.contextmanager
def _parsed(weights: OpenFile) -> Iterator[tuple[Any, dict[str, Any] | None]]:
    with contextlib.ExitStack() as stack:
        path = weights.path_of_descriptor()
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
            metadata = file.metadata()
        except DAMAGE as error:
            reason = str(error).replace(path, weights.path.name)
            raise ValueError(f"{weights.path}: no readable safetensors file: {reason}") from error
        yield file, describe(weights.path, metadata)


# ---- our part of the metadata ----


def describe(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any] | None:
    """Our part of `metadata`, checked; None if there is none, as in PEFT's files."""
    if metadata is None or METADATA_KEY not in metadata:
        return None
    found: dict[str, Any]
    try:
        found = json.loads(metadata[METADATA_KEY])
        version = found["format"]
        if type(version) is int and version > FORMAT:
            raise ValueError(f"format {version}, of a newer randlora; this one reads up to {FORMAT}: update it")
        dims, config = found["dims"], found["config"]
        valid = (
            type(version) is int
            and version == FORMAT
            and set(found) == {"format", "config", "prng", "dims", "fingerprint", "sha256"}
            and isinstance(config, dict)
            and config.keys() >= set(NUMBERS) - {"group_width"}  # the first files know no hadamard
            and all(isinstance(found[key], str) for key in ("prng", "fingerprint", "sha256"))
            and len(dims) == 3
            and all(type(size) is int and size > 0 for size in dims)
        )
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError):
        valid = False
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not valid:
        raise ValueError(f"{path}: its metadata is damaged: {metadata[METADATA_KEY][:200]!r}")
    return found


def check_numbers(what: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """``ValueError`` that begins with `what`, unless `tensor` can be loaded into one of `dtype`."""
    if not dtype.is_floating_point:
        if tensor.dtype != dtype:
            raise ValueError(f"{what} must be {dtype}, got {tensor.dtype}")
    elif tensor.dtype not in FLOATS:
        raise ValueError(f"{what} must be floating-point numbers, got {tensor.dtype}")
    elif not torch.isfinite(tensor.to(dtype)).all():
        raise ValueError(f"{what} holds NaN, infinity or numbers too large for {dtype}")


def checksum(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of the description and of all tensors but the bases, which have their fingerprint."""
    said = {key: value for key, value in description.items() if key != "sha256"}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for key, tensor in sorted(tensors.items()):
        if not is_projection(key):
            digest.update(json.dumps([key, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(as_bytes(tensor))
    return digest.hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def is_projection(key: str) -> bool:
    """PEFT writes the projections once for the model and once more per layer: gigabytes that all say the same."""
    return key.startswith("base_model.") and key.rpartition(".")[2] in BASES
