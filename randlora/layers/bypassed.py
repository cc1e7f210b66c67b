"""Layers whose weights a model reads without calling them: an adapter on such a layer has no effect.

WavLM's attention and Mamba's ``dt_proj`` do that. A layer notes when it is called and when its weight is read; the
first calls of a whole model, one in training mode and one in eval mode, are looked at.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch
from torch import nn


class Noticed:
    """What an adapted layer notes, for :func:`first_calls`."""

    _was_called = _was_read = _is_bypassed = False

    def _note(self, what: str) -> None:
        if not torch.compiler.is_compiling():
            self.__dict__[what] = True

    @property
    def bypassed(self) -> bool:
        """Whether the model read this layer's weight when it was looked at, and has not called the layer since."""
        return self._is_bypassed and not self._was_called


def first_calls(owner: nn.Module, model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context for a call of `model`, which warns if it is the first of its mode and bypasses adapted layers.

    `owner` keeps which calls there have been; :func:`forget_calls` makes the next one a first one again.
    """
    if torch.compiler.is_compiling() or model.training in vars(owner).setdefault("_seen_calls", set()):
        return contextlib.nullcontext()
    return _look(owner._seen_calls, model)


def forget_calls(owner: nn.Module) -> None:
    vars(owner).pop("_seen_calls", None)


@contextlib.contextmanager
def _look(seen: set[bool], model: nn.Module) -> Iterator[None]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Noticed)}
    for layer in layers.values():
        layer._was_called = layer._was_read = layer._is_bypassed = False
    yield
    seen.add(model.training)
    if any(map(_is_compiled, model.modules())):  # a compiled part notes nothing
        return
    found = [name for name, layer in layers.items() if layer._was_read and not (layer._was_called or layer.merged)]
    for name in found:
        layers[name]._is_bypassed = True
    if found:
        names = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        warnings.warn(
            f"{type(model).__name__} reads the weights of {len(found)} of its {len(layers)} adapted layers without "
            f"calling them ({names}): their adapters have no effect and get no gradients; exclude_modules leaves them "
            "out",
            stacklevel=4,
        )


def _is_compiled(module: nn.Module) -> bool:
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.OptimizedModule)
