"""Whether another library, such as PEFT, that reads a file of ours got what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..bases import fingerprint
from ..bases.random_bases import RandomBases
from ..config import RandLoraConfig, config_of_files
from .layout import BASES, checksum, open_file, read_given


def load(path: Path, loader: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """``loader(path)``, of a safetensors file, checked if randlora wrote it.

    Raises:
        ValueError: the file is damaged, its config beside it belongs to another one, or it is no regular file.
    """
    with open_file(path) as (opened, _, described):
        tensors = loader(opened.path_of_descriptor())
    if described is not None:
        config_of_files(path.parent, described, read_given(path.parent))
        if checksum(described, tensors) != described["sha256"] or not _has_its_bases(described, tensors):
            raise ValueError(f"{path} is damaged, or was changed since it was written: its checksum does not match")
    return tensors


def _has_its_bases(described: dict[str, Any], tensors: dict[str, Tensor]) -> bool:
    A, B = (tensors.get(f"base_model.{name}") for name in BASES)
    if A is None and B is None:
        return True
    if A is None or B is None or A.dim() != 3 or B.dim() != 3:
        return False
    if described["prng"] == "none":
        bases = RandomBases.from_tensors(A, B)
    else:
        config = RandLoraConfig.from_dict(described["config"])
        sizes = B.shape[0], A.shape[2], config.r, config.kind, config.projection_prng_key, B.shape[1]
        bases = RandomBases(*sizes, described["prng"], sparsity=config.sparsity, group_width=config.group_width)
    return fingerprint.sha256_of(A, B, bases, *described["dims"]) == described["fingerprint"]
