"""The model card ``README.md`` of a folder with adapters, in the form of PEFT's: what the Hub shows, and how to load.

``library_name`` is ``peft`` where PEFT reads the files: the Hub then shows PEFT's way of loading them, which works, and
finds them as adapters of their base model. Files that PEFT would misread, and is made to refuse, say ``randlora``.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from .layout import PEFT_TYPE, folder_of, read_given
from .opening import OpenFile
from .replace import write_text

if TYPE_CHECKING:
    from ..model.adapters import Adapters

CARD_NAME = "README.md"
_LONGEST = 16 << 20  # bytes
_USE = "RandLoraModel.from_pretrained("  # a card that has this says already how to load the adapter


def write(model: Adapters, folder: Path, repo_id: str | None = None, tags: Iterable[str] = ()) -> None:
    """Write the card for the adapters that are in `folder`."""
    text = text_for(model, folder, {}, repo_id, tags)
    if text is not None:
        write_text(folder / CARD_NAME, text)


def text_for(
    model: Adapters, folder: Path, written: Mapping[str, str], repo_id: str | None = None, tags: Iterable[str] = ()
) -> str | None:
    """The text of the card for `folder`: a new one, or the one that is there with its front matter brought up to date.

    Of an existing card all text stays; how to load the adapter is added at its end if it does not say so. None where
    an existing one is left alone: it says all that, or cannot be read, or ``huggingface_hub``, which reads it, is not
    installed.

    Args:
        written: adapter name -> ``peft_type``, of those that are about to be written; others may be in `folder` before.
        repo_id: of the repository that `folder` is for, to load the adapter from; else it is loaded from ``"."``.
    """
    types = {name: _type_in(folder_of(folder, name)) for name in model.peft_config} | dict(written)
    types = {name: kind for name, kind in types.items() if kind is not None}
    by_peft = all(kind == PEFT_TYPE for kind in types.values()) and bool(types)
    base = _base_name(model, types)
    data = _data(model.model, base if _is_repository(base) else None, by_peft, tags)
    use = _use(model.model, base, list(types), by_peft, repo_id)
    # What it may have said so far; trainers write a card before the adapter.
    ours = {_use(model.model, base, names, peft, None) for names in (list(types), []) for peft in (True, False)}
    try:
        with contextlib.ExitStack() as stack:
            file = OpenFile.if_there(folder / CARD_NAME, stack)
            old = None if file is None else file.read(_LONGEST).decode()
        new = f"---\n{_yaml(data)}---\n\n{_TEXT}\n{use}"
        return new if old is None else None if old == new else _updated(old, data, ours, use)
    except Exception as error:  # whatever YAML makes of a text of the user's
        warnings.warn(f"{folder / CARD_NAME} is left as it is: {error}", stacklevel=2)
        return None


_TEXT = """# RandLoRA adapter

Trained with randlora: full-rank parameter-efficient fine-tuning ([arXiv 2502.00987](https://arxiv.org/abs/2502.00987)).
"""


def _data(model: nn.Module, base: str | None, by_peft: bool, more: Iterable[str]) -> dict[str, Any]:
    tags = {"randlora", *more, *(getattr(model, "model_tags", None) or [])}
    if _is_of_transformers(model):
        tags.add("transformers")
    if base is not None:
        tags.add(f"base_model:adapter:{base}")
    data = {"base_model": base, "library_name": "peft" if by_peft else "randlora", "tags": sorted(tags)}
    if _named_class(model).__name__.endswith("ForCausalLM"):
        data["pipeline_tag"] = "text-generation"
    return {key: value for key, value in data.items() if value is not None}


def _yaml(data: Mapping[str, Any]) -> str:
    """Strings and lists of strings. JSON's strings are YAML's; most need no quotes."""
    lines = []
    for key, value in sorted(data.items()):
        values = [f"- {_scalar(item)}" for item in value] if isinstance(value, list) else []
        lines += [f"{key}:", *values] if values else [f"{key}: {_scalar(value)}"]
    return "".join(f"{line}\n" for line in lines)


def _scalar(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][\w./:-]*[\w/]", text) and text.lower() not in _NOT_TEXT
    return text if plain else json.dumps(text)


_NOT_TEXT = {"true", "false", "yes", "no", "on", "off", "null"}  # in YAML


def _updated(old: str, data: Mapping[str, Any], ours: Iterable[str], use: str) -> str | None:
    """`ours`: sections that `use` replaces."""
    try:
        from huggingface_hub import ModelCard
    except ImportError:
        return None
    found = ModelCard(old)
    found.data["library_name"] = data["library_name"]
    if "base_model" in data:
        found.data["base_model"] = data["base_model"]
    found.data["tags"] = sorted({*data["tags"], *(found.data.tags or [])})
    if not found.data.pipeline_tag and "pipeline_tag" in data:
        found.data["pipeline_tag"] = data["pipeline_tag"]
    if present := [section for section in ours if section in found.text]:
        found.text = found.text.replace(max(present, key=len), use)
    elif _USE not in found.text:
        found.text = f"{found.text.rstrip()}\n\n{use}"
    return str(found)


def _use(model: nn.Module, base: str | None, names: Iterable[str], by_peft: bool, repo_id: str | None) -> str:
    """A section that says how to load the adapters `names`."""
    imports, made = ["import randlora"], f"base = ...  # the {_named_class(model).__name__} that was adapted"
    if _is_of_transformers(model):
        cls = _named_class(model).__name__
        imports.append(f"from transformers import {cls}")
        labels = getattr(model.config, "num_labels", 2) if "Classification" in cls else 2
        more = "" if labels == 2 else f", num_labels={labels}"
        made = f"base = {cls}.from_pretrained({json.dumps(base or '...')}{more})"
    place, there = json.dumps(repo_id or "."), "" if repo_id else "  # the folder of this file"
    others = [name for name in names if name != "default"]
    paths = {name: place if name == "default" else json.dumps(f"{repo_id or '.'}/{name}") for name in names}
    lines = []
    if repo_id and others:  # in folders of the repository
        imports.append("from huggingface_hub import snapshot_download")
        lines, there = [f"folder = snapshot_download({place})"], ""
        paths = {name: "folder" if name == "default" else f"folder + {json.dumps('/' + name)}" for name in names}
    first = "default" if "default" in paths else next(iter(paths), "default")
    path = paths.pop(first, place)
    given = "" if first == "default" else f", {json.dumps(first)}"
    lines += [made, f"model = randlora.RandLoraModel.from_pretrained(base, {path}{given}){there}"]
    lines += [f"model.load_adapter({path}, {json.dumps(name)})" for name, path in paths.items()]
    code = "\n".join([*imports, "", *lines])
    text = f"## How to load it\n\n```python\n{code}\n```\n"
    if by_peft and first == "default":
        text += f"\nPEFT reads it too: `peft.PeftModel.from_pretrained(base, {place})`.\n"
    return text


def _type_in(folder: Path) -> str | None:
    with contextlib.suppress(ValueError):
        return (read_given(folder) or {}).get("peft_type")
    return None


def _base_name(model: Adapters, names: Iterable[str]) -> str | None:
    """The name or path that the base model was loaded from."""
    base: Any = model.model
    known = [model.peft_config[name].base_model_name_or_path for name in names]
    known += [getattr(base, "name_or_path", None), getattr(getattr(base, "config", None), "_name_or_path", None)]
    return next((str(name) for name in known if name), None)


def _is_repository(name: str | None) -> bool:
    """Whether the Hub takes it for a base model. It refuses a card that names a folder."""
    return name is not None and re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not os.path.isdir(name)


def _named_class(model: nn.Module) -> type:
    """The model's class without those that FSDP2 and the like derive from it: the first that can be imported."""
    classes = (c for c in type(model).__mro__ if getattr(sys.modules.get(c.__module__), c.__name__, None) is c)
    return next(classes, type(model))


def _is_of_transformers(model: nn.Module) -> bool:
    return _named_class(model).__module__.startswith("transformers.") and hasattr(model, "config")
