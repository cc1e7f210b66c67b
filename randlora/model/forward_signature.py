"""A subclass per class of wrapped model, whose ``forward`` has the wrapped one's signature."""

from __future__ import annotations

import functools
import inspect
from typing import Any
from weakref import WeakKeyDictionary

_made: WeakKeyDictionary[type, dict[type, type]] = WeakKeyDictionary()


def class_for(base: type, wrapped: type) -> type:
    """The subclass of `base`, a ``RandLoraModel``, for models of the class `wrapped`; one for each pair."""
    known = _made.setdefault(wrapped, {})
    if base not in known:
        known[base] = _make(base, wrapped)
    return known[base]


def new(base: type, wrapped: type) -> Any:
    """An empty instance, for copying and unpickling."""
    cls = class_for(base, wrapped)
    return cls.__new__(cls)


def _make(base: type, wrapped: type) -> type:
    @functools.wraps(base.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs)

    parameters = list(inspect.signature(wrapped.forward).parameters.values())
    last = parameters.pop() if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else None
    if all(parameter.name != "adapter_names" for parameter in parameters):
        parameters.append(inspect.Parameter("adapter_names", inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = inspect.Signature([*parameters, *([last] if last else [])])
    name = f"{base.__name__}[{wrapped.__name__}]"
    return type(name, (base,), {"forward": forward, "__module__": base.__module__, "__doc__": base.__doc__})
