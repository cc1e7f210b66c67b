"""Copies and patterns of bases that are kept: made once, complete before anyone reads them, never inside a graph.

:class:`randlora.RandomBases` holds them; the functions here make them, at trace time under torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

from ..checks import require_int
from . import patterns

if TYPE_CHECKING:
    from .random_bases import RandomBases

_handles = itertools.count()
_by_handle: weakref.WeakValueDictionary[str, RandomBases] = weakref.WeakValueDictionary()


def register(bases: RandomBases) -> str:
    """A handle that is never given twice: torch.compile can take a string for a constant, not an object."""
    handle = f"bases {next(_handles)}"
    _by_handle[handle] = bases
    return handle


def renew_in_children(renew: Callable[[], None]) -> Callable[[], None]:
    """Have `renew` make a lock anew in every forked child: a thread that held it is not there to give it back.

    What such a lock guards is whole at any moment, not only while nobody holds it.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)
    return renew


@renew_in_children
def _renew() -> None:
    for bases in list(_by_handle.values()):
        bases._lock = threading.Lock()


class Ready:
    """What layers take, as attributes: torch.compile reads them when they are asked for, but a dict once per graph."""

    @staticmethod
    @functools.cache
    def name(*key) -> str:
        return re.sub(r"\W", "_", "_".join(map(str, key)))


@contextlib.contextmanager
def of_no_context() -> Iterator[None]:
    """For what outlives the context it is first asked for in: it must not be that context's inference tensor, wrapper
    of torch.func, or fake tensor.
    """
    # An export would record the change of grad mode, were it not for DisableTorchFunction.
    with (
        torch._C.DisableTorchFunction(), torch._C._DisableFuncTorch(), _disable_current_modes(),
        torch.inference_mode(False), torch.no_grad(),
    ):  # fmt: skip
        yield


def are_wanted_fake() -> bool:
    """Whether this runs under a FakeTensorMode of the user's, to learn shapes.

    It takes no real tensors, and may speak of devices that are not there. That of torch.export does take them, as
    constants of the program.
    """
    mode = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    return mode is not None and not mode.allow_non_fake_inputs


@torch.compiler.assume_constant_result
def make_sure(handle: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Generates the copy of these bases if there is none: at trace time under torch.compile, never in its graph.

    Returns the name that :class:`Ready` has it under; None where nothing has numbers (:func:`are_wanted_fake`).
    """
    if are_wanted_fake():
        return None
    bases = _by_handle[handle]
    name = Ready.name(dtype, device)
    if not hasattr(bases._ready, name):
        with bases._lock, of_no_context():
            if (dtype, device) not in bases._held:
                _refuse_capture(device)
                drawn = bases.draw(dtype, device)
                settle(device)
                bases._held[dtype, device] = drawn
            setattr(bases._ready, name, bases._held[dtype, device])
    return name


@torch.compiler.assume_constant_result
def make_sure_pattern(handle: str, device: torch.device, min_dim: int) -> str | None:
    """As :func:`make_sure`, for the lists and the part of them that `min_dim` asks for; None if there are no lists."""
    if are_wanted_fake():
        return None
    bases = _by_handle[handle]
    name = Ready.name("pattern", min_dim, device)
    if hasattr(bases._ready, name):
        return name
    if device in bases._without_lists:
        return None
    require_int("min_dim", min_dim, 1, bases.min_dim)  # a pattern of fewer columns than it claims would drop the rest
    with bases._lock, of_no_context():
        _refuse_capture(device)  # what is made is looked at, too
        found = bases._lists.get(device)
        if found is None:
            if bases.prng == "philox":
                found = patterns.make(bases, device), bases.scale
            else:
                values = bases.draw(torch.float32, device) if bases.given is None else bases.given
                found = patterns.of_tensors(*(t.to(device) for t in values), held=bases.given is not None)
            if found is None:
                bases._without_lists.add(device)
                return None
            settle(device)
            bases._lists[device] = found
        setattr(bases._ready, name, (found[0].of(min_dim), found[1]))
    return name


def settle(device: torch.device) -> None:
    """Wait for what the current stream has made to be kept: who reads it later, on any stream, knows of no wait."""
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
