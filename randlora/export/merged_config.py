"""What ``config.json`` says of a merged model: the dtype of its files, and whether weights are tied still."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import Tensor, nn

from ..model import ties


class Cast:
    """Tensors in the dtype that was asked for; those that transformers keeps in float32 beside it stay as they are."""

    def __init__(self, model: nn.Module, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        kept = ["_keep_in_fp32_modules_strict", *(["_keep_in_fp32_modules"] if dtype is torch.float16 else [])]
        self._kept = {part for name in kept for part in getattr(model, name, None) or ()}

    def like(self, name: str, like: Tensor) -> Tensor:
        """A tensor of this shape and of the dtype to write, on the meta device."""
        casts = self.dtype is not None and like.is_floating_point() and self._kept.isdisjoint(name.split("."))
        return torch.empty(like.shape, dtype=self.dtype if casts else like.dtype, device="meta")


def cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` in `dtype`. Raises ``ValueError`` where that makes infinity of numbers."""
    result = tensor.to(dtype)
    narrower = dtype.is_floating_point and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrower and not torch.equal(result.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} has numbers that are too large for {dtype}: give another dtype; nothing was written")
    return result


def require_untied(model: nn.Module) -> None:
    """Raises ``ValueError`` for a model that is tied again whenever it is loaded.

    Where a model computes with the flag, that must stay; then transformers 5 compares what a file has for both places.
    """
    if ties.computes_with_flag(model) and not hasattr(model, "all_tied_weights_keys"):
        raise ValueError(
            f"{type(model).__name__} shares a weight that the adapter changes in one place only, and computes with "
            f"config.{ties.FLAG}, so that transformers before version 5 would tie them again: leave that layer out of "
            "the adapter"
        )


def config_text(config: dict[str, Any], model: Any, dtype: torch.dtype | None, untied: bool) -> str:
    """`config`, what the base's ``config.json`` says, with `dtype` if there is one, and ties gone if `untied`."""
    config = copy.deepcopy(config)
    if untied and not ties.computes_with_flag(model):
        # All of it, as other settings may be taken from the flag where a file does not have them (T5's scale).
        config |= json.loads(model.config.to_json_string(use_diff=False))
        config[ties.FLAG] = False
        _untie(config, model.config)
    if dtype is not None:
        names = [name for name in ("dtype", "torch_dtype") if name in config] or ["torch_dtype"]
        config.update(dict.fromkeys(names))
        _set_dtype(config, str(dtype).removeprefix("torch."))
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def _set_dtype(config: dict[str, Any], name: str) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _set_dtype(value, name)
        elif key in ("dtype", "torch_dtype"):
            config[key] = name


def _untie(config: dict[str, Any], known: Any) -> None:
    if getattr(known, ties.FLAG, False):
        config[ties.FLAG] = False
    for key, value in config.items():
        part = getattr(known, key, None)
        if isinstance(value, dict) and hasattr(part, "to_dict"):
            _untie(value, part)
