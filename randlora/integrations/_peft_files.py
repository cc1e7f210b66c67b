"""Reading adapters with PEFT: files of ours are checked, and names do not depend on torch.compile."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import checkpoint
from ..names import plain_name


def checked(load_file: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """safetensors' ``load_file``, which raises ``ValueError`` for a damaged file that randlora wrote."""

    @functools.wraps(load_file)
    def load(filename: str | os.PathLike, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return checkpoint.load(Path(filename), lambda path: load_file(path, *args, **kwargs))

    return load


def renaming(set_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's ``set_peft_model_state_dict``, which finds modules whether they or those of the file are compiled."""

    @functools.wraps(set_state_dict)
    def set_peft_model_state_dict(model: nn.Module, peft_model_state_dict: Mapping[str, Any], *args, **kwargs) -> Any:
        return set_state_dict(model, _renamed(model, peft_model_state_dict), *args, **kwargs)

    return set_peft_model_state_dict


def _renamed(model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
    modules = {plain_name(name): name for name, _ in model.named_modules()}
    if all(plain == name for plain, name in modules.items()) and all(plain_name(key) == key for key in state):
        return state
    result = {}
    for key, value in state.items():
        owner, rest = plain_name(key), []
        while owner and owner not in modules:
            owner, _, part = owner.rpartition(".")
            rest.insert(0, part)
        new = ".".join([modules[owner], *rest] if owner else rest)
        if new in result:
            raise ValueError(f"the state dict has {plain_name(key)} twice, as {key} too")
        result[new] = value
    return result
