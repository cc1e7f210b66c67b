"""Bases that layers share: one object per definition in a process, as long as some layer uses it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

from .copies import renew_in_children
from .definition import group_width_of, sparsity_of
from .random_bases import RandomBases

_lock = threading.Lock()
_shared: weakref.WeakValueDictionary[tuple, RandomBases] = weakref.WeakValueDictionary()


@renew_in_children
def _renew() -> None:
    global _lock
    _lock = threading.Lock()


class SharedBases(RandomBases):
    """Bases that this process has once. Unpickled, they join those of the process they come to."""

    def __reduce__(self) -> tuple[Any, ...]:
        remake, arguments = super().__reduce__()
        is_shared = _shared.get((self.r, self.seed, self.kind, self.sparsity, self.group_width)) is self
        return _join if is_shared else remake, arguments


def shared_bases(
    r: int, seed: int = 0, kind: str = "dense", sparsity: float | None = None, group_width: int | None = None
) -> RandomBases:
    """The process-wide Philox store of this definition, which every layer without bases of its own uses.

    It starts empty (one column) and grows with the layers that :meth:`RandomBases.require` it. ``very_sparse`` needs
    its sparsity given, and ``hadamard`` its group width, as there is no size yet to take them from.
    """
    if kind == "very_sparse" and sparsity is None:
        raise ValueError("a shared very_sparse store needs its sparsity, got None")
    if kind == "hadamard" and group_width is None:
        raise ValueError("a shared hadamard store needs its group_width, got None")
    key = r, seed, kind, sparsity_of(kind, 1, sparsity), group_width_of(kind, group_width)
    return shared(key, lambda: SharedBases(1, 1, r, kind, seed, sparsity=sparsity, group_width=group_width))


def shared(key: tuple, make: Callable[[], RandomBases]) -> RandomBases:
    """The bases that this process keeps under `key`, made by `make` if there are none."""
    with _lock:
        found = _shared.get(key)
        if found is None:
            found = _shared[key] = make()
    return found


def _join(arguments: dict[str, Any]) -> RandomBases:
    names = ("r", "seed", "kind", "sparsity", "group_width")
    bases = shared_bases(**{name: arguments[name] for name in names if name in arguments})
    bases.require(arguments["max_dim"], arguments["min_dim"], arguments["num_bases"])
    return bases
