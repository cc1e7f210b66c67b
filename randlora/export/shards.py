"""Weights of a model in safetensors' files, written one tensor at a time: no shard is ever in memory as a whole.

safetensors' own function takes all tensors of a file at once. The format is simple: eight bytes with the length of a
JSON header, the header with name, dtype, shape and place of every tensor, and their bytes one after the other. So where
shapes and dtypes are known, the header can be written first, and the tensors come in any order.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX = "model.safetensors.index.json"


class Shards:
    """The files ``model.safetensors``, or ``model-00001-of-...`` with an index, of tensors that are like `likes`.

    Args:
        likes: name -> a tensor, which may be on meta, of the shape and the dtype that will be written.
        max_shard_size: of one file: bytes, or a text such as ``"5GB"``. A tensor that is larger has a file of its own.

    Raises:
        ValueError: a dtype that the format has not, or a size that is none.
    """

    def __init__(self, likes: Mapping[str, Tensor], max_shard_size: int | str) -> None:
        from huggingface_hub import split_torch_state_dict_into_shards

        self.likes = dict(likes)
        for name, like in self.likes.items():
            if like.dtype not in _NAMES:
                raise ValueError(f"{name} cannot be written: safetensors has no {like.dtype}")
        size = _size(max_shard_size)
        empty = {key: torch.empty(like.shape, dtype=like.dtype, device="meta") for key, like in self.likes.items()}
        split = split_torch_state_dict_into_shards(
            empty, filename_pattern="model{suffix}.safetensors", max_shard_size=size
        )
        self.files: dict[str, list[str]] = split.filename_to_tensors
        self.bytes = sum(map(_bytes, self.likes.values()))

    def write(self, folder: Path, tensors: Iterable[tuple[str, Tensor]], report: Callable[[int], Any]) -> None:
        """Write `tensors`, all of them in any order, into `folder`, which has none of these files.

        Args:
            report: called with the bytes of every tensor that was written.

        Raises:
            ValueError: a tensor that is not like the one that was announced. RuntimeError: not all of them.
        """
        places = {}
        for file, names in self.files.items():
            starts, first = _header(folder / file, {name: self.likes[name] for name in names})
            places.update({name: (folder / file, first + start) for name, start in starts.items()})
        for name, tensor in tensors:
            path, place = places.pop(name)
            like = self.likes[name]
            if (tensor.shape, tensor.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"{name} was announced as {list(like.shape)} in {like.dtype}, and is {list(tensor.shape)} in "
                    f"{tensor.dtype}: the model has changed meanwhile"
                )
            with open(path, "r+b") as opened:
                opened.seek(place)
                opened.write(_content(tensor))
            report(_bytes(tensor))
            del tensor
        if places:
            raise RuntimeError(f"{next(iter(places))} was announced and not given")
        if len(self.files) > 1:
            index = {
                "metadata": {"total_size": self.bytes},
                "weight_map": {name: file for file, names in self.files.items() for name in sorted(names)},
            }
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _size(given: Any) -> int:
    """In bytes. Raises ``ValueError`` for what is no size above 0."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?) *([KMGT])B", given.strip().upper()) if isinstance(given, str) else None
    if found is not None:
        size = int(float(found[1]) * 1000 ** " KMGT".index(found[2]))
    else:
        size = given if isinstance(given, int) and not isinstance(given, bool) else 0
    if size < 1:
        raise ValueError(f"max_shard_size must be a number of bytes above 0, or a text like '5GB', got {given!r}")
    return size


def _header(path: Path, likes: Mapping[str, Tensor]) -> tuple[dict[str, int], int]:
    """Makes the file, as long as it will be; where the tensors begin in its data, and where that begins."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in sorted(likes, key=lambda name: -likes[name].element_size()):  # each is aligned to its elements then
        starts[name] = end
        end += _bytes(likes[name])
        place = {"data_offsets": [starts[name], end]}
        header[name] = {"dtype": _NAMES[likes[name].dtype], "shape": list(likes[name].shape), **place}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return starts, 8 + len(text)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _content(tensor: Tensor) -> Any:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""
