"""The model card ``README.md`` of a folder with adapters, in the form of PEFT's: what the Hub shows, and how to load.

``library_name`` is ``peft`` where PEFT reads the files: the Hub then shows PEFT's way of loading them, which works, and
finds them as adapters of their base model. Files that PEFT would misread, and is made to refuse, say ``randlora``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
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

    Of an existing card all text stays but for what was written here about loading; that is added at its end if it does
    not say so. None where an existing one is left alone: it says all that, or cannot be read, or ``huggingface_hub``,
    which reads it, is not installed.

    Args:
        written: adapter name -> ``peft_type``, of those that are about to be written; others may be in `folder` before.
        repo_id: of the repository that `folder` is for, to load the adapter from; else it is loaded from the one that
            an existing card names, or from ``"."``.
    """
    types = {name: _type_in(folder_of(folder, name)) for name in model.peft_config} | dict(written)
    types = {name: kind for name, kind in types.items() if kind is not None}
    by_peft = all(kind == PEFT_TYPE for kind in types.values()) and bool(types)
    base = _base_name(model, types)
    try:
        data = _data(model.model, base if _is_repository(base) else None, by_peft, tags)
        use = functools.partial(_use, model.model, base, list(types), by_peft)
        with contextlib.ExitStack() as stack:
            file = OpenFile.if_there(folder / CARD_NAME, stack)
            old = None if file is None else file.read(_LONGEST).decode()
        made = f"---\n{_yaml(data)}---\n\n{_TEXT}\n{use(repo_id)}"
        if old is None or old == made:
            return made if old is None else None
        new = _updated(old.replace("\r\n", "\n"), data, use, repo_id)
        mostly = 2 * old.count("\r\n") > old.count("\n")
        return new.replace("\n", "\r\n") if new is not None and mostly else new
    except Exception as error:  # whatever YAML makes of a text of the user's: no adapter is lost for it
        warnings.warn(f"{folder / CARD_NAME} is left as it is: {error}", stacklevel=2)
        return None


def text_for_lora(model: nn.Module, base: str | None, lost: str) -> str:
    """The text of a card for a folder with an adapter of LoRA that was one of RandLoRA. `lost`: what it is of it."""
    data = _data(model, base if _is_repository(base) else None, True, ["lora"])
    cls = _named_class(model).__name__
    of_transformers = _is_of_transformers(model)
    lines = ["from peft import PeftModel", *([f"from transformers import {cls}"] if of_transformers else []), ""]
    made = f"{cls}.from_pretrained({_quoted(base or '...')})" if of_transformers else f"...  # the {cls}"
    lines += [f"base = {made}", 'model = PeftModel.from_pretrained(base, ".")  # the folder of this file']
    code = "\n".join(lines)
    return f"---\n{_yaml(data)}---\n\n{_TEXT_OF_LORA.format(lost=lost)}\n## How to load it\n\n```python\n{code}\n```\n"


_TEXT_OF_LORA = """# LoRA adapter

Trained as RandLoRA with randlora ([arXiv 2502.00987](https://arxiv.org/abs/2502.00987)) and exported as LoRA: {lost}.
"""
_TEXT = """# RandLoRA adapter

Trained with randlora: full-rank parameter-efficient fine-tuning ([arXiv 2502.00987](https://arxiv.org/abs/2502.00987)).
"""


def _data(model: nn.Module, base: str | None, by_peft: bool, more: Iterable[str]) -> dict[str, Any]:
    tags = {"randlora", *([more] if isinstance(more, str) else more), *(getattr(model, "model_tags", None) or [])}
    if _is_of_transformers(model):
        tags.add("transformers")
    if base is not None:
        tags.add(f"base_model:adapter:{base}")
    data = {"base_model": base, "library_name": "peft" if by_peft else "randlora", "tags": sorted(tags)}
    if _named_class(model).__name__.endswith("ForCausalLM"):
        data["pipeline_tag"] = "text-generation"
    return {key: value for key, value in data.items() if value is not None}


def _yaml(data: Mapping[str, Any]) -> str:
    """Strings and lists of strings, most of which need no quotes."""
    lines = []
    for key, value in sorted(data.items()):
        values = [f"- {_scalar(item)}" for item in value] if isinstance(value, list) else []
        lines += [f"{key}:", *values] if values else [f"{key}: {_scalar(value)}"]
    return "".join(f"{line}\n" for line in lines)


def _scalar(text: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][\w./:-]*[\w/]", text) and text.lower() not in _NOT_TEXT
    return text if plain else _quoted(text)


def _quoted(text: str) -> str:
    """A string as YAML and Python both read it: JSON's, but with one escape for a character."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))


_NOT_TEXT = {"true", "false", "yes", "no", "on", "off", "null"}  # in YAML


def _updated(old: str, data: Mapping[str, Any], use: Callable[[str | None], str], repo_id: str | None) -> str | None:
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
    section = _SECTION.search(found.text)
    if section is not None and _unchanging(section[0]) == _unchanging(use(None)):
        new = use(repo_id or _repository_in(section[0]))
        found.text = found.text[: section.start()] + new + found.text[section.end() :]
    elif _USE not in found.text:
        found.text = f"{found.text.rstrip()}\n\n{use(repo_id)}"
    return str(found)


_SECTION = re.compile(r"## How to load it\n\n```python\n.*?\n```\n(\nPEFT reads it too: `[^\n]*`\.\n)?", re.DOTALL)
# What is in lines that begin so depends on the adapters, and on where they are.
_CHANGING = (
    "from huggingface_hub import snapshot_download", "folder = snapshot_download(", "PEFT reads it too: ",
    f"model = randlora.{_USE}", "model.load_adapter(",
)  # fmt: skip


def _unchanging(section: str) -> list[str]:
    """What :func:`_use` writes for any adapters of a model, so that it is known whether somebody has changed it."""
    return [line for line in section.splitlines() if line and not line.startswith(_CHANGING)]


def _repository_in(section: str) -> str | None:
    found = re.search(r'(?:snapshot_download\(|RandLoraModel\.from_pretrained\(base, )"([^".][^"]*)"', section)
    return None if found is None else found[1]


def _use(model: nn.Module, base: str | None, names: Iterable[str], by_peft: bool, repo_id: str | None) -> str:
    """A section that says how to load the adapters `names`."""
    imports, made = ["import randlora"], f"base = ...  # the {_named_class(model).__name__} that was adapted"
    if _is_of_transformers(model):
        cls = _named_class(model).__name__
        imports.append(f"from transformers import {cls}")
        labels = getattr(model.config, "num_labels", 2) if "Classification" in cls else 2
        more = "" if labels == 2 else f", num_labels={labels}"
        made = f"base = {cls}.from_pretrained({_quoted(base or '...')}{more})"
    place, there = _quoted(repo_id or "."), "" if repo_id else "  # the folder of this file"
    others = [name for name in names if name != "default"]
    paths = {name: place if name == "default" else _quoted(f"{repo_id or '.'}/{name}") for name in names}
    lines = []
    if repo_id and others:  # in folders of the repository
        imports.append("from huggingface_hub import snapshot_download")
        lines, there = [f"folder = snapshot_download({place})"], ""
        paths = {name: "folder" if name == "default" else f"folder + {_quoted('/' + name)}" for name in names}
    first = "default" if "default" in paths else next(iter(paths), "default")
    path = paths.pop(first, place)
    given = "" if first == "default" else f", {_quoted(first)}"
    lines += [made, f"model = randlora.RandLoraModel.from_pretrained(base, {path}{given}){there}"]
    lines += [f"model.load_adapter({path}, {_quoted(name)})" for name, path in paths.items()]
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
