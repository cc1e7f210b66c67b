"""Bases that layers share: one object per definition in a process, as long as some layer uses it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from .copies import renew_in_children
from .random_bases import RandomBases, group_width_of, sparsity_of

_lock = threading.Lock()
_shared: weakref.WeakValueDictionary[tuple, RandomBases] = weakref.WeakValueDictionary()


@renew_in_children
def _renew() -> None:
    global _lock
    _lock = threading.Lock()


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
    return shared(key, lambda: RandomBases(1, 1, r, kind, seed, sparsity=sparsity, group_width=group_width))


def shared(key: tuple, make: Callable[[], RandomBases]) -> RandomBases:
    """The bases that this process keeps under `key`, made by `make` if there are none."""
    with _lock:
        found = _shared.get(key)
        if found is None:
            found = _shared[key] = make()
    return found


def rebuild(arguments: dict, shared: bool) -> RandomBases:
    """Unpickles bases; those of the process-wide store join the one of this process."""
    if not shared:
        return RandomBases(**arguments)
    bases = shared_bases(*(arguments.get(name) for name in ("r", "seed", "kind", "sparsity", "group_width")))
    bases.require(arguments["max_dim"], arguments["min_dim"], arguments["num_bases"])
    return bases


def is_shared(bases: RandomBases) -> bool:
    return _shared.get((bases.r, bases.seed, bases.kind, bases.sparsity, bases.group_width)) is bases
