"""The files of a base model: its weights, read one tensor at a time, and everything else, which is copied."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..model.of_config import first_line
from .shards import DTYPES, INDEX

_WEIGHTS = (
    "*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data",
    "*.gguf", "*.tflite", "*.mlmodel", "*.ot", "*.npz", "*.pkl",
)  # fmt: skip
_ADAPTER = ("adapter_config.json", "adapter_model.*")  # transformers would load it on top
# What a trainer writes beside an adapter, and what goes with the text that it was trained on.
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "*preprocessor_config.json", "processor_config.json", "spiece.model", "sentencepiece*",
)  # fmt: skip


class BaseFiles:
    """The folder of a model of transformers, or of a snapshot of a repository of the Hugging Face hub.

    ``likes`` has the tensors of its files on the meta device.

    Raises:
        ValueError: a folder without safetensors' files, or with quantised ones. ImportError: safetensors is missing.
    """

    def __init__(self, name: str | os.PathLike, revision: str | None = None) -> None:
        self.folder = _folder(name, revision)
        if not (self.folder / "config.json").is_file():
            raise ValueError(f"the folder {str(self.folder)!r} has no config.json")
        self.config = _json(self.folder / "config.json")
        if self.config.get("quantization_config") is not None:
            raise ValueError(
                f"{self.folder} holds quantised weights: name the model that they were made of, by base_model= or "
                "--model, and quantise the result"
            )
        self._files = self._where()
        self.likes: dict[str, Tensor] = {}
        for path in dict.fromkeys(self._files.values()):
            with self._open(path) as file:
                for key in (key for key, where in self._files.items() if where == path):
                    try:
                        part = file.get_slice(key)
                    except Exception as error:  # of safetensors
                        raise ValueError(f"{path} has no {key}, which the index says is there") from error
                    if part.get_dtype() not in DTYPES:
                        raise ValueError(f"{path}: {key} is of dtype {part.get_dtype()}, which cannot be read")
                    self.likes[key] = torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")

    def _where(self) -> dict[str, Path]:
        index = self.folder / INDEX
        if index.is_file():
            names = _json(index).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
                raise ValueError(f"{index} has no weight_map, which says where the weights are: copy it once more")
            return {key: self.folder / file for key, file in names.items()}
        path = self.folder / "model.safetensors"
        if path.is_file():
            with self._open(path) as file:
                return dict.fromkeys(file.keys(), path)
        pickles = sorted(p.name for p in self.folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".h5", ".gguf"))
        raise ValueError(
            f"{self.folder} has no model.safetensors{f', but {pickles[0]}' if pickles else ''}: the base is read from "
            "safetensors' files. Load it with transformers and write it anew, model.save_pretrained(folder), or load "
            "the adapter onto it and export that model"
        )

    @staticmethod
    def _open(path: Path) -> Any:
        from safetensors import safe_open

        try:
            return safe_open(str(path), "pt")
        except Exception as error:  # of safetensors, or the system
            raise ValueError(f"{path}: cannot be read: {error}") from error

    def get(self, key: str) -> Tensor:
        """One tensor; the file is closed again, so that what was read of it does not stay in memory."""
        with self._open(self._files[key]) as file:
            tensor: Tensor = file.get_tensor(key)
            return tensor

    def others(self, adapter: Path) -> dict[str, Path]:
        """Name -> file, of all that is no weight: of the base, and the tokenizer's files of the adapter."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith((".", "checkpoint-")) for part in name.parts)
            if path.is_file() and not hidden and not _is(path, _WEIGHTS):
                found[name.as_posix()] = path
        found |= {path.name: path for path in sorted(adapter.iterdir()) if path.is_file() and _is(path, _TOKENIZER)}
        return {name: path for name, path in found.items() if not _is(path, _ADAPTER) and name != "config.json"}


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object, but a {type(found).__name__}")
    return found


def copy(files: dict[str, Path], folder: Path) -> None:
    for name, path in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def _is(path: Path, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns)


def _folder(name: str | os.PathLike, revision: str | None) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    unwanted = [pattern for pattern in _WEIGHTS if pattern not in ("*.safetensors", "*.index.json")]
    try:
        unwanted += ["consolidated*", "original/*"]
        return Path(snapshot_download(str(name), revision=revision, ignore_patterns=unwanted))
    except Exception as error:  # of huggingface_hub's HTTP library
        raise ValueError(
            f"base model {str(name)!r}: it is no folder here, and the hub could not give it: {first_line(error)}"
        ) from error
