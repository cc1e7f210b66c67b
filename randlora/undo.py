"""All or nothing: what an operation that fails has changed in modules is put back."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from .distributed.fsdp import hold_parts

_CONTAINERS = (dict, OrderedDict, list, set)


@contextlib.contextmanager
def all_or_nothing(*modules: nn.Module, values: Iterable[Tensor] = (), deep: bool = True) -> Iterator[None]:
    """If the block raises, `modules` and all that is in them become what they were before it.

    That is: which modules, parameters, buffers, hooks and attributes there are (the same objects, in containers that
    are the same objects), their classes, and ``requires_grad`` of every parameter.

    Args:
        values: tensors that are there before and that the block writes numbers into; costs a copy of them.
        deep: False for a block that changes nothing of the modules inside `modules` but ``requires_grad``: cheaper.
    """
    inside = {id(m): m for root in modules for m in root.modules()}.values()
    hold_parts(inside)
    before = [_Before(module) for module in (inside if deep else modules)]
    flags = {id(p): (p, p.requires_grad) for module in inside for p in module._parameters.values() if p is not None}
    numbers = [(tensor, tensor.detach().clone()) for tensor in values]
    try:
        yield
    except BaseException:
        for part in before:
            part.restore()
        for parameter, flag in flags.values():
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for tensor, kept in numbers:
            tensor.detach().copy_(kept)
        raise


class _Before:
    """A module's class and attributes, containers one level deep."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.cls = module, type(module)
        self.attributes = dict(vars(module))
        self.containers = [(value, _copy(value)) for value in self.attributes.values() if type(value) in _CONTAINERS]

    def restore(self) -> None:
        if type(self.module) is not self.cls:
            self.module.__class__ = self.cls  # PEFT's modules are converted in place
        attributes = vars(self.module)
        attributes.clear()
        attributes.update(self.attributes)
        for container, content in self.containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


def _copy(container: Any) -> Any:
    # OrderedDict.copy would be slower, and the order is all that matters.
    return list(container.items()) if isinstance(container, dict) else list(container)
