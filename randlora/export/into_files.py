"""An adapter merged into the files of its base model, tensor by tensor: the model itself is never in memory.

Of the base there are the config, from which the modules are made on the meta device, and the files. What the adapter
changes is found in the modules; transformers says which tensors of the files that is. All others are copied.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..config import RandLoraConfig
from ..dtypes import FLOATS
from ..layers.merging import added
from ..model.merged_tensors import Part, parts_of
from ..model.model import RandLoraModel
from ..model.of_config import model_of_config
from ..model.original_names import Original
from .base_files import BaseFiles
from .merged_config import Cast, cast, config_text, require_untied
from .source import adapter_folder, base_name, explained, places_of_biases, put_bias


@dataclass
class Sum:
    """A tensor of the files to which a part of updates is added: those of `group`, under `name` when converted."""

    source: str
    group: tuple[str, ...]
    name: str


@dataclass
class IntoFiles:
    """What :func:`randlora.export.to_merged` writes for an adapter in a folder.

    Raises:
        ValueError: an adapter, a base or files that do not fit each other, before anything is written.
    """

    path: str | os.PathLike
    names: Sequence[str]
    base_model: str | os.PathLike | None
    dtype: torch.dtype | None
    likes: dict[str, Tensor] = field(default_factory=dict)
    _sums: dict[str, Sum] = field(default_factory=dict)
    _given: dict[str, Tensor] = field(default_factory=dict)  # not rounded yet
    _dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    _copies: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folders = {name: adapter_folder(self.path, name) for name in self.names}
        configs = {name: RandLoraConfig.from_pretrained(folder) for name, folder in folders.items()}
        first, *others = self.names
        revision = configs[first].revision if self.base_model is None else None
        name = base_name(folders[first], configs[first], self.base_model)
        with explained(name, folders[first], self.base_model):
            self.base = BaseFiles(name, revision)
        model = model_of_config(str(self.base.folder))
        self._dtypes = {key: tensor.dtype for key, tensor in model.state_dict().items()}
        _widen(model)
        state = model.state_dict(keep_vars=True)
        there = {id(tensor) for tensor in state.values() if not tensor.is_meta}
        ties: dict[int, list[str]] = {}
        for name, tensor in state.items():
            ties.setdefault(id(tensor), []).append(name)
        self._prefix = getattr(model, "base_model_prefix", "")
        self._original = Original(model, state)
        if any(config.bias != "none" for config in configs.values()):
            self._bring_in_biases(model)
        try:
            adapted = RandLoraModel.from_pretrained(model, folders[first], first)
        except ValueError as error:
            raise ValueError(
                f"{error}. The base is {self.base.folder}, by its config a {type(model).__name__}: name another by "
                "base_model= or --model; for an adapter of a model with another head, load that model and the adapter, "
                "and export the model"
            ) from error
        for name in others:
            adapted.load_adapter(folders[name], name)
        adapted.set_adapter(list(self.names), inference_mode=True)
        self._parts = parts_of(adapted.model, self.names, numbers=False)
        changed = {name: part for name, part in self._parts.items() if _is_changed(part, there)}
        groups = [names for names in ties.values() if len(names) > 1]
        self.untied = any(_is_broken(names, self._parts, changed) for names in groups)
        if self.untied:
            require_untied(adapted.model)
        self._plan(changed, {name: names for names in groups for name in names}, groups)
        self._cast = Cast(model, self.dtype)
        likes = {name: self.base.likes[source] for name, source in self._sources().items()}
        for name, value in self._given.items():
            likes[name] = torch.empty(value.shape, dtype=self._dtypes[name], device="meta")
        self.likes = {name: self._cast.like(name, like) for name, like in likes.items()}
        self.config = config_text(self.base.config, adapted.model, self.dtype, self.untied)
        self.files = self.base.others(folders[first])

    # ---- what becomes of which tensor ----

    def _plan(self, changed: dict[str, Part], ties: dict[str, list[str]], groups: list[list[str]]) -> None:
        for key, part in changed.items():
            group = self._original.group_of[key]
            if part.update is None and len(group) > 1:
                raise ValueError(
                    f"{key} was trained, and the base's files have it in one with others: export the model"
                )
            if part.update is not None:
                self._plan_sums(key, group, ties.get(key, []))
            else:
                tied = not self.untied and any(self._find(name, part.like) for name in ties.get(key, ()))
                for name, value in self._original.convert({key: part.make()}).items():
                    file = self._find(name, value)
                    if file is None and tied:  # in the files by another name
                        continue
                    if file is None and key not in ties:
                        self._require_new(name)
                    self._given[file or name] = value
                    self._dtypes[file or name] = self._dtypes[key] if file is None else self.base.likes[file].dtype
        for name, found in self._sums.items():
            if (dtype := self.base.likes[found.source].dtype) not in FLOATS:
                raise ValueError(f"{self.base.folder}: {name} is of {dtype}, which updates cannot be added to")
        self._copies = {name: name for name in self.base.likes if name not in self._sums and name not in self._given}
        for names in groups if self.untied else ():
            for name in names:
                if self._find(name, self._parts[name].like) is None and name not in {**self._sums, **self._given}:
                    self._copies[name] = self._partner(name, names)

    def _plan_sums(self, key: str, group: tuple[str, ...], tied: Sequence[str]) -> None:
        names = self._original.names_of[key]
        found = {name: self._find(name, self._original.likes[name]) for name in names}
        whole = self._find(key, self._parts[key].like)
        if all(found.values()):
            self._sums |= {str(file): Sum(str(file), group, name) for name, file in found.items()}
        elif whole is not None and group == (key,):  # saved as the model has it
            self._sums[whole] = Sum(whole, group, key)
        elif tied and names == [key]:
            self._sums[key] = Sum(self._partner(key, tied), group, key)
        else:
            missing = next((name for name, file in found.items() if file is None), key)
            raise ValueError(
                f"{self.base.folder} has no {missing} of shape {list(self._original.likes[missing].shape)} that {key} "
                "could be merged into: load the model and the adapter, and export the model"
            )

    def _find(self, name: str, like: Tensor) -> str | None:
        """The tensor of the files, which may be of a model with more or less around it, as transformers loads them."""
        prefix = f"{self._prefix}."
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in self.base.likes and self.base.likes[candidate].shape == like.shape:
                return candidate
        return None

    def _partner(self, name: str, tied: Sequence[str]) -> str:
        """The tensor of the files of which `name` would be a copy."""
        for other in tied:
            if (found := self._find(other, self._parts[other].like)) is not None:
                return found
        raise ValueError(f"{self.base.folder} has no {name}, nor what it is tied to")

    def _require_new(self, name: str) -> None:
        parent = name.rpartition(".")[0] + "."
        old = next(
            (key for key in self.base.likes if key.startswith((parent, parent.removeprefix(f"{self._prefix}.")))), None
        )
        if old is not None:
            raise ValueError(
                f"{self.base.folder} has {old}, and no {name} of the shape that the adapter has trained: load the "
                "model and the adapter, and export the model"
            )

    def _bring_in_biases(self, model: nn.Module) -> None:
        """The base's biases, as the adapter need not have all of them."""
        for names in places_of_biases(model):
            like = model.get_parameter(names[0])
            found = next((file for name in names if (file := self._find(name, like)) is not None), None)
            if found is not None:
                put_bias(model, names, self.base.get(found).to(like.dtype))

    # ---- the numbers ----

    def _sources(self) -> dict[str, str]:
        """Name -> the tensor of the files that it is made of."""
        sums = {name: found.source for name, found in self._sums.items()}
        order = {name: name for name in self.base.likes if name in sums or name in self._copies}
        return order | self._copies | sums

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        groups: dict[tuple[str, ...], list[str]] = {}
        for name, found in self._sums.items():
            groups.setdefault(found.group, []).append(name)
        for group, names in groups.items():
            updates = [self._updates(group, adapter) for adapter in self.names]
            for name in names:
                yield name, self._sum(name, [u.pop(self._sums[name].name) for u in updates if u])
            del updates
        for name, source in self._copies.items():
            yield name, cast(name, self.base.get(source), self.likes[name].dtype)
        for name, value in self._given.items():
            yield name, cast(name, value, self.likes[name].dtype)

    def _updates(self, group: tuple[str, ...], adapter: str) -> dict[str, Tensor]:
        """The update of these tensors of the model, as the files have them; nothing if the adapter leaves them out."""
        updates = {key: self._parts[key].update for key in group}
        made = {key: update(adapter) for key, update in updates.items() if update is not None}
        found = {key: update for key, update in made.items() if update is not None}
        if not found:
            return {}
        whole = {key: found[key] if key in found else torch.zeros(self._parts[key].like.shape) for key in group}
        del made, found
        as_it_is = [found.name for found in self._sums.values() if found.group == group] == list(group)
        return whole if as_it_is else self._original.convert(whole)

    def _sum(self, name: str, updates: list[Tensor]) -> Tensor:
        """Rounded once to what is written, or to the file's dtype if that is wider."""
        weight, dtype = self.base.get(self._sums[name].source), self.likes[name].dtype
        merged = added(weight.to(torch.promote_types(weight.dtype, dtype)), updates).to(dtype)
        if not torch.isfinite(merged).all():
            raise ValueError(f"{name} is not finite with the adapter in it, in {dtype}: nothing was written")
        return merged


def _widen(model: nn.Module) -> None:
    """Parameters of 16 bits on meta in fp32: what the adapter has of them is rounded when it is written, once."""
    for parameter in model.parameters():
        if parameter.is_meta and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def _is_changed(part: Part, there: set[int]) -> bool:
    """Whether the adapter has something for it, of a model on meta; `there`: tensors that are not its own."""
    if part.update is not None:
        return True
    if part.computed:  # biases of torch's attention, made of others
        return not part.make().is_meta
    return not (part.like.is_meta or id(part.like) in there)


def _is_broken(tied: list[str], parts: dict[str, Part], changed: dict[str, Part]) -> bool:
    """Whether what was one tensor in the base is several in the merged model."""
    return any(name in changed for name in tied) and len({id(parts[name].like) for name in tied}) > 1
