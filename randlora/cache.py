"""The update of a layer, kept between calls at inference: generating token by token rebuilds nothing.

Under ``no_grad`` in eval mode a layer's second call with unchanged parameters builds the merged weight (fp32, fp64, or
``strategy="merged"``) or the update ``dW`` (16 bits) and keeps it. Version counters of lambda, gamma and the base
weight tell when it is stale; what is written through ``.data`` they do not see: write to the tensor itself under
``no_grad``, or call ``train()`` once. Cached tensors belong to no state dict and no copy, and all together stay below
a limit.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

from torch import Tensor

from .held import settle

_DEFAULT_LIMIT = 1 << 30


@dataclass
class _Budget:
    enabled: bool = True
    limit: int = _DEFAULT_LIMIT
    holders: weakref.WeakSet = field(default_factory=weakref.WeakSet)

    def used(self) -> int:
        return sum(holder.nbytes for holder in self.holders)


_budget = _Budget()


def inference_cache(enabled: bool | None = None, limit: int | None = None) -> dict[str, int | bool]:
    """Switch the inference cache of all layers on or off and bound it; returns the settings and the bytes in use.

    Args:
        enabled: default True. False also frees what is cached.
        limit: bytes that all cached updates of the process may take together, default 1 GiB. Layers that find no room
            compute their update at every call. Lowering it below what is in use frees everything.
    """
    if enabled is not None:
        if not isinstance(enabled, bool):
            raise TypeError(f"enabled must be True or False, got {enabled!r}")
        _budget.enabled = enabled
    if limit is not None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise ValueError(f"limit must be a number of bytes, at least 0, got {limit!r}")
        _budget.limit = limit
    if not _budget.enabled or _budget.used() > _budget.limit:
        for holder in list(_budget.holders):
            holder.clear()
    return {"enabled": _budget.enabled, "limit": _budget.limit, "used": _budget.used()}


class UpdateCache:
    """One layer's cached tensor, what it was built from, and whether the call before this one saw the same."""

    def __init__(self) -> None:
        self.clear()

    def __reduce__(self):
        return UpdateCache, ()  # copies and pickles start empty

    def clear(self) -> None:
        self._seen: tuple | None = None
        self._sources: tuple[weakref.ref, ...] = ()
        self._tensor: Tensor | None = None
        _budget.holders.discard(self)

    @property
    def nbytes(self) -> int:
        return 0 if self._tensor is None else self._tensor.nbytes

    def get(self, sources: tuple[Tensor, ...], settings: tuple, nbytes: int, build) -> Tensor | None:
        """The cached tensor, or None if it is not worth building one now.

        `sources` are the tensors it depends on, `settings` what else it depends on (compared by equality), `nbytes` its
        size, and `build()` makes it. It is built at the second call in a row with the same sources and settings.
        """
        if not _budget.enabled or any(t.is_inference() for t in sources):  # inference tensors count no versions
            self.clear()
            return None
        # Weak references, not ids: a temporary parameter may get the address of the one before it.
        now = (settings, tuple((t.data_ptr(), t._version) for t in sources))
        same = self._seen == now and all(ref() is t for ref, t in zip(self._sources, sources, strict=True))
        if not same:
            self.clear()
            self._seen, self._sources = now, tuple(weakref.ref(t) for t in sources)
        elif self._tensor is None and _budget.used() + nbytes <= _budget.limit:
            tensor = build()
            settle(tensor.device)
            self._tensor = tensor
            _budget.holders.add(self)
        return self._tensor
