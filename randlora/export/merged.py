"""A model folder with an adapter in its weights: ``to_merged``."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.biases import plain
from ..checkpoint.replace import new_folder
from ..distributed import zero3
from ..distributed.gathering import is_dtensor
from ..dtypes import FLOATS
from ..model import ties
from ..model.merged_tensors import Part, each, parts_of
from ..model.model import RandLoraModel
from ..model.original_names import Original
from ..names import plain_name
from .base_files import copy
from .into_files import IntoFiles
from .lora_folder import check_output
from .merged_config import Cast, cast, config_text, require_untied
from .shards import Shards
from .source import NO_ADAPTER


def to_merged(
    model_or_folder: RandLoraModel | str | os.PathLike,
    output: str | os.PathLike,
    adapter_names: str | Sequence[str] | None = None,
    base_model: str | os.PathLike | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    progressbar: bool = False,
) -> None:
    """Write the model with the adapter in its weights as a folder that ``from_pretrained`` of transformers loads.

    Its weights are bit for bit those of ``merge_and_unload()``. They are written one after the other, so that for an
    adapter in a folder neither the model nor a shard is ever in memory as a whole: one weight and its update are. All
    other files of the base model (tokenizer, generation config, ...) are copied, the tokenizer's from the adapter's
    folder where it has them. Where a weight was tied to another and is no longer the same, both are written, and the
    config says that nothing is tied.

    The folder is written beside `output`, as ``<output>.incomplete-<digits>``, and renamed at the end. What raises
    removes it. Only what ends the process at once leaves it, by that name.

    Args:
        model_or_folder: the folder of a saved adapter (or an id of the Hugging Face hub), or an adapted model. A model
            brings its config along, if it is one of transformers, but no tokenizer.
        output: the folder to write, which must not exist or be empty; links are followed. Not the current folder, nor
            where a disk is mounted, as no other folder can be put in its place.
        adapter_names: those to merge. Default: ``"default"`` of a folder, the active ones of a model.
        base_model: for a folder: name or folder of the model that it adapts; default: what the adapter's config says.
            It is read from safetensors' files.
        dtype: of all weights with a floating dtype: float32, bfloat16, float16 or float64. Default: each has the one
            that it has. A model's are merged in their own dtype and then cast, those of files rounded once.
        max_shard_size: of one file, above 0, in bytes or as a text.
        progressbar: show one, by tqdm.

    Raises:
        TypeError, ValueError: arguments that do not fit, and what cannot be merged: quantised weights, a base without
            safetensors' files, a model that processes hold in parts, merged weights that are not finite. Nothing is
            left then.
        OSError: too little space on the disk, which is looked at first, or no access.
    """
    output = _place(output)
    if dtype is not None and dtype not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
    if names is not None and not (isinstance(names, Sequence) and all(isinstance(name, str) for name in names)):
        raise TypeError(f"adapter_names must be a name or names of adapters, got {adapter_names!r}")
    source: IntoFiles | _OfModel
    if isinstance(model_or_folder, RandLoraModel):
        if base_model is not None:
            raise ValueError("base_model is for an adapter in a folder: an adapted model has its own")
        source = _OfModel(model_or_folder, names, dtype)
    elif isinstance(model_or_folder, (str, os.PathLike)):
        if not (base_model is None or isinstance(base_model, (str, os.PathLike))):
            raise TypeError(
                f"base_model must be a name or a folder, as its files are read, got {type(base_model).__name__}"
            )
        chosen = ["default"] if names is None else list(dict.fromkeys(names))
        if not chosen:
            raise ValueError("adapter_names must name at least one adapter of the folder")
        source = IntoFiles(model_or_folder, chosen, base_model, dtype)
    else:
        raise TypeError(
            "model_or_folder must be a randlora.RandLoraModel or the folder of a saved adapter, got "
            f"{type(model_or_folder).__name__}{NO_ADAPTER}; save a model of PEFT, and export the folder"
        )
    shards = Shards(source.likes, max_shard_size)
    others = sum(path.stat().st_size for path in source.files.values())
    _check_space(output, shards.bytes + others)
    with new_folder(output) as folder, _bar(shards.bytes, progressbar) as report:
        copy(source.files, folder)
        generation = getattr(source, "generation_config", None)
        if generation is not None:  # first, as transformers refuses to write some
            generation.save_pretrained(folder)
        shards.write(folder, source.tensors(), report)
        if source.config is not None:
            (folder / "config.json").write_text(source.config, encoding="utf-8")


class _OfModel:
    """What is written for an adapted model in memory."""

    files: dict[str, Path] = {}  # noqa: RUF012

    def __init__(self, adapted: RandLoraModel, names: Sequence[str] | None, dtype: torch.dtype | None) -> None:
        model: Any = getattr(adapted.model, "_orig_mod", adapted.model)  # of torch.compile
        if any(is_dtensor(p) or zero3.is_parameter(p) for p in model.parameters()):
            raise ValueError(
                "processes hold parts of this model's weights (FSDP2, tensor parallel, ZeRO-3): save the adapter, and "
                "export its folder; or take model.merged_tensors() on all processes"
            )
        config = getattr(model, "config", None)
        config = config if hasattr(config, "to_json_string") else None
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError(
                "the model is quantised: load the adapter onto the model as it was before, or save it and export its "
                "folder with that model as base_model"
            )
        parts = parts_of(model, adapted._names(names), safe_merge=True)
        broken = _are_untied(model, parts)
        if broken and config is not None:
            require_untied(model)
        unwanted = set() if broken else _tied(model, parts)
        unwanted |= set(getattr(model, "_keys_to_ignore_on_save", None) or ())
        self._parts = {plain_name(name): part for name, part in parts.items() if name not in unwanted}
        self._original = Original(model, {name: part.like for name, part in self._parts.items()})
        cast = Cast(model, dtype)
        self.likes = {name: cast.like(name, like) for name, like in self._original.likes.items()}
        self.config = None if config is None else _text_of(config, model, dtype, broken)
        can_generate = config is not None and model.can_generate()
        self.generation_config = getattr(model, "generation_config", None) if can_generate else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._original.tensors(each(self._parts)):
            yield name, cast(name, tensor, self.likes[name].dtype)
            del tensor


def _are_untied(model: Any, parts: dict[str, Part]) -> bool:
    """Whether weights that were one are several in the merged model."""
    for owners in ties.shared(model).values():
        names = [f"{plain(path)}.{key}".lstrip(".") for path, _, key in owners]
        found = [parts[name] for name in names if name in parts]
        if any(part.computed or not part.like.is_meta for part in found) and len({id(p.like) for p in found}) > 1:
            return True
    return False


def _tied(model: Any, parts: dict[str, Part]) -> set[str]:
    """Names of what transformers ties to others when it loads the file, one of each staying."""
    patterns = [
        f"{path}.{key}" if path else key
        for path, module in model.named_modules()
        for key in getattr(module, "_tied_weights_keys", None) or ()
    ]
    shared: dict[int, list[str]] = {}
    for name, part in parts.items():
        shared.setdefault(id(part.like), []).append(name)
    found: set[str] = set()
    for names in shared.values():
        tied = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
        found |= set(tied[1:] if len(tied) == len(names) > 1 else tied if len(names) > 1 else ())
    return found


def _text_of(config: Any, model: Any, dtype: torch.dtype | None, untied: bool) -> str:
    said = json.loads(config.to_json_string(use_diff=True))
    return config_text(said | {"architectures": [type(model).__name__]}, model, dtype or model.dtype, untied)


def _place(output: str | os.PathLike) -> Path:
    """Where the folder will be renamed to, links followed: at the end of all the work that must not fail."""
    path = Path(output).resolve()
    check_output(path)
    why = "is the current folder" if path == Path.cwd() else "is where a disk is mounted" if path.is_mount() else None
    if why is not None:
        raise ValueError(f"output {str(output)!r} {why}, in whose place no other can be put: name a folder in it")
    return path


def _check_space(output: Path, needed: int) -> None:
    parent = next(path for path in output.absolute().parents if path.exists())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise OSError(
            f"{output} will have {needed:,d} bytes, and {parent} has {free:,d} left: make room or write elsewhere"
        )


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[int], Any]]:
    if not wanted:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="write merged model", unit="B", unit_scale=True) as bar:
        yield bar.update
