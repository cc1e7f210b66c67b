"""The bases inside a PEFT model: one container of A and one of B for the whole model, which its layers refer to.

PEFT registers the containers in every layer as well. That is why its files hold a copy per layer, and why its cast of
the adapters to fp32 reaches the bases. Here the model alone owns them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from ...bases.random_bases import RandomBases
from ...private_torch import FakeTensor

RANK_AXIS = {"randlora_A": 0, "randlora_B": 2}  # of [r, 1, min_dim] and [max_dim, num_bases, r]


class Bases(BufferDict):
    """PEFT's ``BufferDict`` of one kind of base, ``"randlora_A"`` or ``"randlora_B"``: adapter name -> tensor.

    Tensors are replaced, never written to, so that adapters with equal bases can share them and the copies that
    :class:`Pair` keeps in other dtypes stay true.

    Adapters are attributes here, by their names. What this class has beside PEFT's begins with an underscore, so that
    every name that PEFT takes for an adapter is free.
    """

    @classmethod
    def _make_pair(cls, A: BufferDict | None = None, B: BufferDict | None = None) -> tuple[Bases, Bases]:
        """Two new containers, or PEFT's own `A` and `B` turned into them in place.

        PEFT's are in use: its tuner and every layer have them, and the tuner hands them to the layers to come.
        """
        A, B = (cls({}) if store is None else store for store in (A, B))
        for kind, store, partner in (("randlora_A", A, B), ("randlora_B", B, A)):
            if not isinstance(store, cls):
                store.__class__ = cls
            # Not by setattr, which would register the partner as a child.
            store.__dict__.update(_kind=kind, _partner=partner, _owner=None, _pairs={})
        A._refresh()
        return A, B

    def __setitem__(self, adapter: str, tensor: Tensor) -> None:
        held = self._buffers.get(adapter)
        if held is tensor:
            return
        if is_8_bit(tensor):  # for a weight that is cast for each call: 16 bits hold its numbers, and compute
            tensor = tensor.to(torch.bfloat16)
        persistent = self.persistent if held is None else self._is_persistent(adapter)
        self.register_buffer(adapter, tensor, persistent=persistent)
        self._refresh()

    def __delitem__(self, adapter: str) -> None:
        super().__delitem__(adapter)
        self._non_persistent_buffers_set.discard(adapter)
        for store in (self, self._partner):
            store._pairs.pop(adapter, None)

    def _is_owned(self) -> bool:
        """Whether a tuner has this container. ``peft.inject_adapter_in_model`` throws its tuner away."""
        return self._owner is not None and self._owner() is not None

    def _own(self, tuner: nn.Module) -> None:
        self.__dict__["_owner"] = weakref.ref(tuner)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_owner": None, "_pairs": {}}  # the tuner's __setstate__ owns copies again

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "_pairs" in vars(self._partner):  # the second of the two
            self._refresh()

    def _is_persistent(self, adapter: str) -> bool:
        """Whether state dicts hold the bases of this adapter."""
        return adapter not in self._non_persistent_buffers_set

    # ---- as the op takes them ----

    def _pair(self, adapter: str) -> Pair:
        A, B = (self, self._partner) if self._kind == "randlora_A" else (self._partner, self)
        A, B = A[adapter], B[adapter]
        pair = self._pairs.get(adapter)
        if pair is not None and isinstance(A, FakeTensor):  # torch.export puts them in the place of all buffers
            return pair
        if pair is None or pair.A is not A or pair.B is not B:
            pair = Pair.of(A, B)
            for store in (self, self._partner):
                store._pairs[adapter] = pair
        return pair

    def _refresh(self) -> None:
        """Makes pairs ahead of their use: torch.compile could not trace that."""
        for adapter, tensor in self._buffers.items():
            other = self._partner._buffers.get(adapter)
            # Between changing one container and the other they disagree.
            if other is not None and (other.dtype, other.device) == (tensor.dtype, tensor.device):
                self._pair(adapter)

    def _share(self, adapter: str) -> None:
        """Let `adapter` hold the same tensors as an adapter that has equal ones."""
        for other, tensor in self._buffers.items():
            mine = self._buffers[adapter]
            if other == adapter or tensor is mine or tensor.shape != mine.shape:
                continue
            if (tensor.dtype, tensor.device) == (mine.dtype, mine.device) and torch.equal(tensor, mine):
                self[adapter] = tensor
                return

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Bases:
        known = {}
        for adapter, tensor in self._buffers.items():  # shared tensors stay shared
            if id(tensor) not in known:
                moved = fn(tensor)
                known[id(tensor)] = tensor, tensor.to(moved.device) if is_8_bit(moved) else moved
            self._buffers[adapter] = known[id(tensor)][1]
        self._refresh()
        return self

    # ---- loading ----

    def _take(self, adapter: str, tensor: Tensor, assign: bool = False) -> bool:
        """Replace an adapter's base by one from a file, without loss; False if its shape does not fit.

        It may be larger than the one that was drawn: PEFT saves the bases of the model's first adapter with its others.
        It is held in the dtype of the one before where that changes no value (PEFT writes 16-bit numbers in fp32).
        """
        held = self._buffers[adapter]
        axis = RANK_AXIS[self._kind]
        if tensor.dim() != 3 or tensor.shape[axis] != held.shape[axis]:
            return False
        if any(got < needed for got, needed in zip(tensor.shape, held.shape, strict=True)):
            return False
        tensor = tensor.detach().to(tensor.device if assign or held.is_meta else held.device)
        cast = tensor.to(held.dtype)
        if torch.equal(cast.to(tensor.dtype), tensor):
            tensor = cast
        if tensor.dtype == held.dtype and tensor.device == held.device and torch.equal(tensor, held):
            return True
        self[adapter] = tensor if assign else tensor.clone()
        self._share(adapter)
        return True

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        assign = local_metadata.get("assign_to_params_buffers", False)
        state_dict = dict(state_dict)
        for adapter in self:
            tensor = state_dict.get(prefix + adapter)
            if tensor is None or not self._is_persistent(adapter):
                continue
            if self._take(adapter, tensor, assign):
                state_dict[prefix + adapter] = self[adapter]  # else torch reports its size
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)


def is_8_bit(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1


# While a pair lives, so do its tensors and their ids.
_pairs: weakref.WeakValueDictionary[tuple[int, int], Pair] = weakref.WeakValueDictionary()


class Pair:
    """A and B of one adapter, in whatever dtype and on whatever device a layer computes, one copy of each.

    Ternary bases (PEFT: -c, 0, c) go to 16 bits as -1, 0, 1 and a factor, which is exact; c itself would be rounded.
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        self.A, self.B = A, B
        self.bases = RandomBases.from_tensors(A, B)
        # Bases are replaced, never written to; but DistributedDataParallel copies a model's buffers over themselves.
        self.bases.watched = False
        self.signs: RandomBases | None = None
        self.factor = 1.0
        if A.dtype.itemsize > 2 and not A.is_meta:
            of_A, of_B = _ternary_size(A), _ternary_size(B)
            if of_A is not None and of_B is not None:
                self.signs, self.factor = _Signs.around(A, B), of_A * of_B

    @classmethod
    def of(cls, A: Tensor, B: Tensor) -> Pair:
        pair = _pairs.get((id(A), id(B)))
        if pair is None:
            pair = _pairs[id(A), id(B)] = cls(A, B)
        return pair

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """A, B and the factor that their product lacks."""
        if dtype.itemsize == 2 and self.signs is not None:
            return *self.signs.tensors(dtype, device), self.factor
        return *self.bases.tensors(dtype, device), 1.0


class _Signs(RandomBases):
    """The signs of given bases."""

    watched = False  # as for the bases of a Pair

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self.given is not None
        A, B = (t.to(device).sign().to(dtype) for t in self.given)
        return A, B


def _ternary_size(tensor: Tensor) -> float | None:
    """c, if all elements are -c, 0 or c."""
    sizes = tensor.abs()
    c = sizes.max()
    return c.item() if c > 0 and ((sizes == 0) | (sizes == c)).all() else None
