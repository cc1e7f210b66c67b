"""Changes of a model that happen whole or not at all: what it was is noted first, and restored if an error comes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .. import quantized
from ..layer import RandLoraLayer


class Before:
    """What the modules of a model are: classes, attributes, children, trainability. Not the numbers in its tensors."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = []
        for module in model.modules():
            attributes = dict(vars(module))
            contents = {k: copy.copy(v) for k, v in attributes.items() if isinstance(v, (dict, list, set))}
            self._modules.append((module, module.__class__, attributes, contents))
        self._flags = [(parameter, parameter.requires_grad) for parameter in model.parameters() if parameter.is_leaf]

    def restore(self) -> None:
        for module, cls, attributes, contents in self._modules:
            module.__class__ = cls
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                held = attributes[name]  # the same container: hooks, for one, refer to theirs
                held.clear()
                held.extend(content) if isinstance(held, list) else held.update(content)
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)


@contextmanager
def undone_if_it_fails(model: nn.Module) -> Iterator[None]:
    """An error inside leaves the modules of `model` as they were. For changes that write to no weight."""
    before = Before(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise


@contextmanager
def unmerged_if_it_fails(model: nn.Module) -> Iterator[None]:
    """An error inside leaves `model` as it was: what was merged, bit for bit, and which weights are tied."""
    before, config = Before(model), getattr(model, "config", None)
    tied = getattr(config, "tie_word_embeddings", None)
    layers = [module for module in model.modules() if isinstance(module, RandLoraLayer)]
    found = [(layer, list(layer.merged_adapters), _weight_to_keep(layer)) for layer in layers]
    try:
        yield
    except BaseException:
        for layer, merged, weight in found:
            if layer.merged_adapters == merged:
                continue
            base = layer.get_base_layer()
            if not merged:
                layer.unmerge()
            elif quantized.is_quantized(base):
                quantized.replace_weight(base, weight)
            else:
                with torch.no_grad():
                    base.weight.copy_(weight)
        before.restore()
        if tied is not None:
            config.tie_word_embeddings = tied
        raise


def _weight_to_keep(layer: RandLoraLayer) -> torch.Tensor | None:
    """A layer that has nothing merged keeps its weight by itself when it merges."""
    if not layer.merged:
        return None
    base = layer.get_base_layer()
    return base.weight if quantized.is_quantized(base) else base.weight.detach().clone()
