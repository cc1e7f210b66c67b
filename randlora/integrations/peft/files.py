"""Reading adapters with PEFT: files of ours are checked, and names do not depend on torch.compile."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from peft import RandLoraConfig
from torch import Tensor, nn

from ...checkpoint import checking
from ...names import plain_name
from .wrappers import make_room, saved_names


def checked(load_file: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """safetensors' ``load_file``, which raises ``ValueError`` for a damaged file that randlora wrote."""

    @functools.wraps(load_file)
    def load(filename: str | os.PathLike, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return checking.load(Path(filename), lambda path: load_file(path, *args, **kwargs))

    return load


def renaming(set_state_dict: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's ``set_peft_model_state_dict``, which finds modules whether they or those of the file are compiled.

    Those of ``modules_to_save`` that are on the meta device get memory for the numbers, which torch would lose.
    """

    @functools.wraps(set_state_dict)
    def set_peft_model_state_dict(
        model: nn.Module, peft_model_state_dict: Mapping[str, Any], adapter_name: str = "default", *args, **kwargs
    ) -> Any:
        if isinstance(getattr(model, "peft_config", {}).get(adapter_name), RandLoraConfig):
            make_room(model, adapter_name)
        state = _renamed(model, peft_model_state_dict, adapter_name)
        return set_state_dict(model, state, adapter_name, *args, **kwargs)

    return set_peft_model_state_dict


def _renamed(model: nn.Module, state: Mapping[str, Any], adapter: str) -> Mapping[str, Any]:
    modules = {plain_name(name): name for name, _ in model.named_modules()}
    if all(plain == name for plain, name in modules.items()) and all(plain_name(key) == key for key in state):
        return state
    # PEFT looks for the tensors of these under the wrapper's name, which no module of theirs has.
    saved = {plain_name(name): name for name in saved_names(model, adapter)}
    result = {}
    for key, value in state.items():
        owner, rest = plain_name(key), []
        while owner and owner not in modules:
            owner, _, part = owner.rpartition(".")
            rest.insert(0, part)
        new = saved.get(plain_name(key)) or ".".join([modules[owner], *rest] if owner else rest)
        if new in result:
            raise ValueError(f"the state dict has {plain_name(key)} twice, as {key} too")
        result[new] = value
    return result
