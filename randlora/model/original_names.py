"""Names and shapes of the files of the Hugging Face hub, where transformers has others in its models.

transformers 5 fuses the weights of experts, among others, when it loads a model, and can take them apart again. It does
so with a whole state dict; here with one tensor at a time, or with the few that are one in the files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_Tensors = dict[str, Tensor]


class Original:
    """What the tensors of `model`, which are like `likes`, are in files.

    ``likes`` has the names, shapes and dtypes there. ``names_of`` has for each name of the model those in files, and
    ``group_of`` the names of the model that are converted together with it.

    Raises:
        ValueError: transformers gives one tensor in files for several that are in different layers.
    """

    def __init__(self, model: nn.Module, likes: Mapping[str, Tensor]) -> None:
        self._revert = _reverting(model)
        empty = {key: torch.empty(like.shape, dtype=like.dtype, device="meta") for key, like in likes.items()}
        whole = self._revert(empty)
        self.group_of: dict[str, tuple[str, ...]] = {key: (key,) for key in empty}
        self.names_of = {key: list(self._alone(key, empty[key], whole)) for key in empty}
        # A tensor in files that is made of several: those of one layer are converted together.
        parted = [key for key, names in self.names_of.items() if not names]
        together: dict[str, list[str]] = {}
        for key in parted:
            together.setdefault((re.findall(r".*\.\d+(?=\.)", key) or [""])[0], []).append(key)
        for group in together.values():
            names = list(self._revert({key: empty[key] for key in group}))
            self.group_of.update(dict.fromkeys(group, tuple(group)))
            self.names_of.update(dict.fromkeys(group, names))
        self.likes = {name: whole[name] for names in self.names_of.values() for name in names if name in whole}
        if missing := sorted(whole.keys() - self.likes.keys()):
            raise ValueError(f"transformers makes {missing[0]} of weights of several layers: this is not supported")

    def _alone(self, key: str, empty: Tensor, whole: _Tensors) -> _Tensors:
        """What the files have for one tensor; nothing where it takes others to tell."""
        if key in whole and whole[key].shape == empty.shape:
            return {key: empty}
        try:
            found = self._revert({key: empty})
        except Exception:  # whatever an operation raises that lacks a tensor
            return {}
        alike = all(name in whole and whole[name].shape == tensor.shape for name, tensor in found.items())
        return found if alike else {}

    def convert(self, group: Mapping[str, Tensor]) -> _Tensors:
        """The tensors in files of those that are converted together, by their names in the model."""
        unchanged = all(self.names_of[key] == [key] for key in group)
        return dict(group) if unchanged else self._revert(dict(group))

    def tensors(self, items: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of files, from those of the model."""
        waiting: _Tensors = {}
        for key, tensor in items:
            group = self.group_of[key]
            if len(group) == 1:
                yield from self.convert({key: tensor}).items()
            else:
                waiting[key] = tensor
                if all(other in waiting for other in group):
                    yield from self.convert({other: waiting.pop(other) for other in group}).items()
            del tensor


def _reverting(model: Any) -> Callable[[_Tensors], _Tensors]:
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return lambda tensors: tensors
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4: the models that have other names say so
        patterns = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return lambda tensors: {_renamed(name, patterns): tensor for name, tensor in tensors.items()}
    return lambda tensors: revert_weight_conversion(model, dict(tensors))


def _renamed(name: str, patterns: Mapping[str, str]) -> str:
    """As ``save_pretrained`` of transformers 4.57: the first pattern, turned round, that fits."""
    for source, target in patterns.items():
        name, count = re.subn(target, re.sub(r"\(.*\)", "", source.lstrip("^")), name)
        if count:
            break
    return name
