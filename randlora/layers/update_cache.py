"""The inference cache: inside a scope that the caller opens, layers keep their updates between calls.

Outside of a scope nothing is kept, so that nothing can be out of date: whether a parameter has been written to cannot
be known cheaply, as ``.data``, fused optimizers and other processes move no version counter. Inside one the caller
says that this does not happen. A scope holds the tensors itself, serves the thread that opened it, and drops everything
when it closes: no two threads share an entry, and layers hold none.

Building an update costs as much as decoding some dozens of tokens without it, and nobody knows how many will come. So a
layer builds once its calls have spent that much on their updates (by :mod:`randlora.planner`): at the prompt if that is
long, after some words if it is not. That is never more than twice the cost of the better choice.
"""

from __future__ import annotations

import contextlib
import contextvars
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

_DEFAULT_LIMIT = 1 << 30


def inference_cache(limit: int = _DEFAULT_LIMIT) -> AbstractContextManager[InferenceCache]:
    """A scope in which adapted layers keep their updates: ``with randlora.inference_cache(): ...``, or as a decorator.

    For many calls with few tokens each and unchanged parameters, such as decoding; ``generate`` of a
    :class:`randlora.RandLoraModel` opens one by itself. Inside it, a layer in eval mode under ``no_grad`` builds its
    merged weight (fp32, fp64, or ``strategy="merged"``) or its update ``dW`` (16 bits) once its calls have spent as
    much on it as building costs, and uses it from then on. When the scope closes, all of it is freed.

    What moves a version counter is seen inside a scope too: in-place operations of any thread, optimizers that are not
    fused, ``load_state_dict``, merging. So are ``set_adapter``, other parameters or scalings, and moves to other
    devices or dtypes; and a call in training mode or with gradients makes a layer forget what it keeps, so that a fused
    optimizer may step after it. What cannot be seen is the caller's promise: while the scope is open, no writes through
    ``.data`` or by fused optimizers between two calls under ``no_grad``, and none by another process or CUDA stream.
    Where that may happen, open shorter scopes or none.

    Layers whose active adapters all have Hadamard bases keep nothing: a token takes them little more than the frozen
    layer does. Nor do layers that FSDP2 shards: their parameters are brought in anew for every call.

    Args:
        limit: bytes that the kept tensors may take together, default 1 GiB. Layers that find no room compute as usual;
            0: nothing is kept, in ``generate`` neither.

    Returns:
        A context manager, which gives an :class:`InferenceCache` (``nbytes`` is what it holds). A scope inside another
        one of the same thread joins it, and its `limit`. Other threads take no part and may open their own.

    Raises:
        ValueError: a `limit` that is no number of bytes.
    """
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
        raise ValueError(f"limit must be a number of bytes, at least 0, got {limit!r}")
    return _opened(limit)


@contextlib.contextmanager
def _opened(limit: int) -> Iterator[InferenceCache]:
    outer = current()
    if outer is not None:
        yield outer
        return
    cache = InferenceCache(limit)
    if torch.compiler.is_compiling():  # graphs keep nothing
        yield cache
        return
    cache._open()
    token = _current.set(cache)
    try:
        yield cache
    finally:
        cache._close()
        # A generator may be closed in another context than it was opened in, which then knows nothing of the cache.
        with contextlib.suppress(ValueError):
            _current.reset(token)


_current: contextvars.ContextVar[InferenceCache | None] = contextvars.ContextVar("inference_cache", default=None)


def current() -> InferenceCache | None:
    """The cache that a call here may use: not one that came with a context from another thread, nor a closed one."""
    if torch.compiler.is_compiling():
        return None
    cache = _current.get()
    return cache if cache is not None and cache._serves_this_thread() else None


class InferenceCache:
    """What one scope of :func:`inference_cache` holds. ``limit``: the bytes that it may hold."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._thread: int | None = None  # None: closed
        self._layers: weakref.WeakKeyDictionary[nn.Module, dict[tuple, _Entry]] = weakref.WeakKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are held now. May be read from any thread."""
        layers = [ref() for ref in self._layers.keyrefs()]
        entries = [entry for layer in layers if layer is not None for entry in [*self._layers.get(layer, {}).values()]]
        return sum(entry.tensor.nbytes for entry in entries if entry.tensor is not None)

    def _serves_this_thread(self) -> bool:
        return self._thread == threading.get_ident()

    def _open(self) -> None:
        self._thread = threading.get_ident()

    def _close(self) -> None:
        self._thread = None
        self._layers.clear()

    def forget(self, layer: nn.Module) -> None:
        self._layers.pop(layer, None)

    def get(
        self, layer: nn.Module, key: tuple, sources: list[Tensor], settings: list, nbytes: int,
        price: Callable[[], tuple[float, float]], build: Callable[[], Tensor],
    ) -> Tensor | None:  # fmt: skip
        """The tensor that is kept for `layer` under `key`, or None if the call is to compute as usual.

        Args:
            sources: the tensors it is built from. settings: what else it depends on (compared by equality).
            nbytes: its size. price: what this call would spend without it, and what building it costs.
            build: makes it.
        """
        entries = self._layers.get(layer)
        entry = None if entries is None else entries.get(key)
        if entry is not None and not entry.is_current(sources, settings):
            entry = None
        if entry is not None and entry.tensor is not None:
            return entry.tensor
        if not all(_can_be_watched(t) for t in sources):
            return None
        if entry is None:
            entries = self._layers.setdefault(layer, {})
            entries.pop(key, None)  # freed before the next one is built
            entry = entries[key] = _Entry(sources, settings)
        if entry.tensor is None:
            rent, building = price()
            entry.spent += rent
            if entry.spent < building or self.nbytes + nbytes > self.limit:
                return None
            entry.tensor = build()
        return entry.tensor


class _Entry:
    """A tensor (None: not built yet) and what it was, or is to be, built from.

    The sources are held, so that no other tensor can take their identity, and so is their memory, so that none can take
    its address (``.to()`` gives a parameter new memory). References to them are strong, as
    ``torch.utils.swap_tensors`` refuses tensors with weak ones.
    """

    def __init__(self, sources: list[Tensor], settings: list) -> None:
        self.tensor: Tensor | None = None
        self.spent = 0.0
        self._versions = _versions(sources)  # before it is built: a write meanwhile makes it out of date
        self._sources, self._settings = sources, settings
        self._memory = [t.untyped_storage() for t in sources]

    def is_current(self, sources: list[Tensor], settings: list) -> bool:
        same = self._settings == settings and len(self._sources) == len(sources)
        return same and all(map(operator.is_, self._sources, sources)) and self._versions == _versions(sources)


def _versions(sources: list[Tensor]) -> list[tuple[int, int]]:
    return [(t.data_ptr(), t._version) for t in sources]


def _can_be_watched(tensor: Tensor) -> bool:
    """Whether it tells when it is written to: inference tensors count no versions, subclasses their own or none."""
    return type(tensor) in (Tensor, nn.Parameter) and not (tensor.is_inference() or tensor.is_meta)
