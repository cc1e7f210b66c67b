"""The open weights of an adapter: which tensors they hold, known from the header alone, and the tensors."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import FLOATS
from ..names import plain_name
from .layout import BASES, DAMAGE, WEIGHTS_NAME, check_numbers, is_projection, open_adapter


class Place(NamedTuple):
    """A tensor of the file, and the dtype of what it will be copied into."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Weights:
    """An open ``adapter_model.safetensors``; what it cannot read, or what is no number, raises ``ValueError``."""

    path: Path
    file: Any
    described: dict[str, Any] | None
    given: dict[str, Any] | None  # adapter_config.json

    @classmethod
    @contextlib.contextmanager
    def open(cls, folder: Path) -> Iterator[Weights]:
        path = folder / WEIGHTS_NAME
        with open_adapter(folder) as (file, described, given):
            pickles = sorted(p.name for p in folder.glob("adapter_model.*") if p.suffix in (".bin", ".pt", ".pth"))
            if file is None and pickles:
                raise ValueError(
                    f"{folder / pickles[0]} is a pickle, which can run any code when it is loaded: load it with PEFT, "
                    "if you trust it, and save it anew with safe_serialization=True"
                )
            if file is None:
                whole = sorted(p.name for p in folder.glob("model*.safetensors"))
                hint = "".join(
                    f". The folder holds a whole model ({name}): if transformers' own Trainer wrote it, "
                    "randlora.integrations.transformers.Trainer resumes from it, and saves the adapter"
                    for name in whole[:1]
                )
                raise ValueError(f"{path}: cannot be read: {os.strerror(errno.ENOENT)}{hint}")
            yield cls(path, file, described, given)

    def shapes(self) -> dict[str, Place]:
        """Shapes of all tensors by their names in a model that is not compiled, from the header alone."""
        found: dict[str, Place] = {}
        for key in self.file.keys():  # noqa: SIM118
            if (name := plain_name(key)) in found:
                raise ValueError(f"{self.path} holds {name} twice, as {found[name].key} and as {key}")
            found[name] = Place(key, tuple(self.file.get_slice(key).get_shape()))
        return found

    def get(self, key: str) -> Tensor:
        """The tensor, which may be a view of the file itself."""
        try:
            tensor: Tensor = self.file.get_tensor(key)
            return tensor
        except DAMAGE as error:
            raise ValueError(f"{self.path}: {key} cannot be read: {error}") from error

    def tensors(self) -> dict[str, Tensor]:
        """All but the projections."""
        return {key: self.get(key) for key in self.file.keys() if not is_projection(key)}  # noqa: SIM118

    def projections(self) -> tuple[Tensor, Tensor] | None:
        keys = sorted(filter(is_projection, self.file.keys()))
        first = [min((k for k in keys if k.endswith(name)), key=len, default=None) for name in BASES]
        found = [key for key in first if key is not None]
        if not found:
            return None
        if len(found) < len(first):
            raise ValueError(f"{self.path} holds only one of randlora_A and randlora_B")
        A, B = (self.get(key) for key in found)
        for key, tensor in zip(found, (A, B), strict=True):
            check_numbers(f"{self.path}: {key}", tensor, tensor.dtype if tensor.dtype in FLOATS else torch.float32)
        return A, B
