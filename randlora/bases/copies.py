"""The copies of bases that are kept: each is made once, complete before anyone reads it, and never inside a graph."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import require_int
from ..private_torch import fake_mode, without_dispatch_modes, without_torch_function, without_transforms
from .parts import Part
from .patterns import Form, Pattern


class Source(Protocol):
    """Bases of which copies can be made."""

    min_dim: int

    def draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]: ...

    def draw_part(self, part: Part) -> tuple[Tensor, Tensor]: ...

    def pack(self, device: torch.device) -> tuple[Form, float] | None: ...


class Ready:
    """The copies that layers take, as attributes: torch.compile guards an attribute, but the whole of a dict."""

    @staticmethod
    @functools.cache
    def name(*key: object) -> str:
        return re.sub(r"\W", "_", "_".join(map(str, key)))


class Copies:
    """What is kept of one store of bases: A and B per dtype and device, and a packed form per device.

    Any number of threads may ask for copies. Whoever makes one, or changes the size of the bases, holds ``lock``.
    ``handle`` is a string of this object alone: torch.compile can take a string for a constant, but no object.

    Args:
        bases: what the copies are made of; kept by a weak reference, as it holds its copies itself.
        given: tensors that are the copy in their own dtype and on their own device.
    """

    def __init__(self, bases: Source, given: tuple[Tensor, Tensor] | None = None) -> None:
        self.lock = threading.Lock()
        self.handle = f"bases {next(_handles)}"
        self._bases: Callable[[], Any] = weakref.ref(bases)  # a Source: while it is asked, it is there
        self._given = given
        self._dense: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]] = {}
        self._packed: dict[torch.device, tuple[Form, float]] = {}
        self._parts: dict[Part, tuple[Tensor, Tensor]] = {}
        self.clear()
        by_handle[self.handle] = self

    def clear(self) -> None:
        """Drop all copies. The caller holds ``lock``."""
        self.ready = Ready()
        self._dense.clear()
        self._packed.clear()
        self._parts.clear()
        self._not_packed: set[torch.device] = set()  # where given tensors were looked at in vain
        if self._given is not None:
            self._dense[self._given[0].dtype, canonical(self._given[0].device)] = self._given

    # ---- looking at what there is ----

    @property
    def dense(self) -> dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor]]:
        """A and B as they are kept at the moment."""
        return dict(self._dense)  # other threads may be adding to it

    @property
    def packed(self) -> dict[torch.device, tuple[Form, float]]:
        """Packed forms with their scales as they are kept at the moment."""
        return dict(self._packed)

    @property
    def nbytes(self) -> int:
        dense = [*self.dense.values(), *dict(self._parts).values()]
        return sum(form.nbytes for form, _ in self.packed.values()) + sum(A.nbytes + B.nbytes for A, B in dense)

    # ---- taking ----

    def kept(self, *key: object) -> Any:
        """What is ready under this key: the usual case in eager calls, in a few steps. None in a traced call."""
        if torch.compiler.is_compiling() or are_wanted_fake():
            return None
        return getattr(self.ready, Ready.name(*key), None)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """A and B; None where nothing has numbers (:func:`are_wanted_fake`)."""
        found: tuple[Tensor, Tensor] | None = self._taken(_make_sure, dtype, device)
        return found

    def pattern(self, min_dim: int, device: torch.device) -> tuple[Pattern, float] | None:
        """The part of the packed form that `min_dim` asks for, and its scale; None as above, or if there is no form."""
        found: tuple[Pattern, float] | None = self._taken(_make_sure_pattern, min_dim, device)
        return found

    def part(self, part: Part) -> tuple[Tensor, Tensor] | None:
        """A part of A and B alone; None as above."""
        found: tuple[Tensor, Tensor] | None = self._taken(_make_sure_part, *part)
        return found

    def _taken(self, make_sure: Callable[..., str | None], *key: Any) -> Any:
        name = make_sure(self.handle, *key)
        if name is None:
            return None
        found = getattr(self.ready, name, None)
        return self._taken(make_sure, *key) if found is None else found  # None: cleared by another thread in between

    # ---- making ----

    def make(self, dtype: torch.dtype, device: torch.device) -> str:
        """Have A and B ready; returns the name that :class:`Ready` has them under."""
        return self._drawn(self._dense, (dtype, device), device, lambda: self._bases().draw(dtype, device))

    def make_part(self, part: Part) -> str:
        """The same for a part."""
        return self._drawn(self._parts, part, part.device, lambda: self._bases().draw_part(part))

    def _drawn(
        self, copies: dict[Any, tuple[Tensor, Tensor]], key: tuple, device: torch.device,
        draw: Callable[[], tuple[Tensor, Tensor]],
    ) -> str:  # fmt: skip
        name = Ready.name(*key)
        if not hasattr(self.ready, name):
            with self.lock, of_no_context():
                if key not in copies:
                    _refuse_capture(device)
                    drawn = draw()
                    _synchronize(device)
                    copies[key] = drawn
                setattr(self.ready, name, copies[key])
        return name

    def make_pattern(self, min_dim: int, device: torch.device) -> str | None:
        """The same for the part of the packed form that `min_dim` asks for; None if there is no form."""
        name = Ready.name("pattern", min_dim, device)
        if hasattr(self.ready, name):
            return name
        if device in self._not_packed:
            return None
        # A pattern of fewer columns than it claims would leave the rest of the features out.
        require_int("min_dim", min_dim, 1, self._bases().min_dim)
        with self.lock, of_no_context():
            _refuse_capture(device)  # what is made is looked at, too
            found = self._packed.get(device)
            if found is None:
                found = self._bases().pack(device)
                if found is None:
                    self._not_packed.add(device)
                    return None
                _synchronize(device)
                self._packed[device] = found
            setattr(self.ready, name, (found[0].of(min_dim), found[1]))
        return name


_handles = itertools.count()
by_handle: weakref.WeakValueDictionary[str, Copies] = weakref.WeakValueDictionary()


# At trace time under torch.compile, never in its graph.
@torch.compiler.assume_constant_result
def _make_sure(handle: str, dtype: torch.dtype, device: torch.device) -> str | None:
    return None if are_wanted_fake() else by_handle[handle].make(dtype, device)


@torch.compiler.assume_constant_result
def _make_sure_pattern(handle: str, min_dim: int, device: torch.device) -> str | None:
    return None if are_wanted_fake() else by_handle[handle].make_pattern(min_dim, device)


@torch.compiler.assume_constant_result
def _make_sure_part(handle: str, *part: Any) -> str | None:
    return None if are_wanted_fake() else by_handle[handle].make_part(Part(*part))


# ---- where copies are made ----


@contextlib.contextmanager
def of_no_context() -> Iterator[None]:
    """What is made in here outlives the context it is first asked for in.

    So it must not become that context's inference tensor, wrapper of torch.func, or fake tensor.
    """
    # An export would record the change of grad mode, were it not for the first of them.
    with (
        without_torch_function(), without_transforms(), without_dispatch_modes(),
        torch.inference_mode(False), torch.no_grad(),
    ):  # fmt: skip
        yield


def are_wanted_fake() -> bool:
    """Whether this runs under a FakeTensorMode of the user's, to learn shapes.

    It takes no real tensors, and may speak of devices that are not there. That of torch.export does take them, as
    constants of the program.
    """
    mode = fake_mode()
    return mode is not None and not mode.allow_non_fake_inputs


def _synchronize(device: torch.device) -> None:
    """Wait until the current stream has made what is kept: later readers may be on streams that wait for nothing."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _refuse_capture(device: torch.device) -> None:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a layer generates its bases at its first call, which a CUDA graph cannot capture: "
            "call the model once before the capture"
        )


def canonical(device: torch.device | str) -> torch.device:
    """With an index, so that ``cuda`` and ``cuda:0`` are one key."""
    if not isinstance(device, torch.device):
        device = torch.device(device)
    if device.index is None and device.type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device


# ---- after a fork ----


def renew_in_children(renew: Callable[[], None]) -> Callable[[], None]:
    """Have `renew` make a lock anew in every forked child: the thread that held it is not there to release it.

    What such a lock guards is whole at any moment, not only while nobody holds it.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)
    return renew


@renew_in_children
def _renew() -> None:
    for copies in list(by_handle.values()):
        copies.lock = threading.Lock()
