"""Tensors of which several processes hold a part each: made whole, written into, saved by one process.

These are ``DTensor`` and the parameters of DeepSpeed's ZeRO-3 (:mod:`randlora.distributed.zero3`).

Imports nothing of ``torch.distributed``: where it has not been imported, there are no such tensors.
"""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from . import zero3


def is_dtensor(tensor: Any) -> bool:
    return isinstance(tensor, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def is_split(tensor: Any) -> bool:
    """Whether other processes have parts of `tensor` that this one has not."""
    return is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def whole(tensor: Tensor) -> Tensor:
    """`tensor` as an ordinary one with all of its parts: all processes that hold parts must call this in one order."""
    if not is_dtensor(tensor):
        return tensor
    parts: Any = tensor.detach()
    device_type = parts.device_mesh.device_type
    if parts.device.type != device_type:  # offloaded to the CPU, for which the processes may have no backend
        parts = parts.to(device_type)
    result: Tensor = parts.full_tensor()
    return result


def copy_into(target: Any, value: Tensor) -> None:
    """Write the ordinary tensor `value`, the same on all processes, into `target`; each takes its part, none is sent.

    To be called under ``torch.no_grad``.
    """
    zero3.require_whole(target, "an adapter's parameter", "to write over", writing=True)
    target.copy_(split_as(target, value))


def split_as(target: Any, value: Tensor) -> Tensor:
    """The ordinary tensor `value`, the same on all processes, in parts as `target` is; none is sent."""
    if not is_dtensor(target):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(target.device_mesh.device_type)
    return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None).to(target.device)


class Processes:
    """The processes that hold parts of the same tensors, or this one alone. True if there are several.

    All of them must make the same calls, which wait for the others; one alone waits for nobody.
    """

    def __init__(self, groups: Iterable[Any], gpu: torch.device | None = None) -> None:
        self._groups, self._gpu = list(dict.fromkeys(groups)), gpu

    @classmethod
    def that_hold(cls, tensors: Iterable[Any]) -> Processes:
        tensors = list(tensors)
        return cls((group for tensor in tensors for group in groups_of(tensor)), gpu_of(tensors))

    def joined_by(self, tensors: Iterable[Any]) -> Processes:
        """These and those that hold parts of `tensors`."""
        others = Processes.that_hold(tensors)
        return Processes([*self._groups, *others._groups], self._gpu or others._gpu)

    def __bool__(self) -> bool:
        return bool(self._groups)

    def chosen(self, willing: bool) -> bool:
        """Whether this is the first one of the `willing` processes."""
        ranks = [rank for rank, is_willing in self._exchanged(willing).items() if is_willing]
        return willing and (not self or min(ranks) == _distributed().get_rank())

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """What is raised in the block by one process is raised by all of them when they leave it."""
        if not self:
            yield
            return
        error = None
        try:
            yield
        except BaseException as raised:
            error = raised
        errors = self._exchanged(None if error is None else _picklable(error))
        if error is not None:
            raise error
        for rank, theirs in errors.items():
            if theirs is not None:
                raise theirs from RuntimeError(f"this was raised on rank {rank}, and is raised on all others, too")

    def _exchanged(self, value: Any) -> dict[int, Any]:
        """Rank -> the value there."""
        if not self:
            return {}
        try:
            return exchanged(value, self._groups, self._gpu)
        except RuntimeError as error:
            raise RuntimeError(
                "not all processes save the adapter: each holds a part of it (as with FSDP2, tensor parallel or "
                "ZeRO-3), so that all must call save_pretrained, not the first one alone, unless one has died; "
                f"the process group says: {error}"
            ) from error


def exchanged(value: Any, groups: Iterable[Any], gpu: torch.device | None) -> dict[int, Any]:
    """Rank -> the value there, of all ranks that `groups` reach, one after the other. All of them call this.

    `gpu`: this process's own, if it has one: NCCL takes objects by way of the current device, which a script need not
    have set.
    """
    distributed = _distributed()
    known = {distributed.get_rank(): value}
    with contextlib.nullcontext() if gpu is None else torch.cuda.device(gpu):
        for group in groups:
            found: list[Any] = [None] * distributed.get_world_size(group)
            distributed.all_gather_object(found, known, group=group)
            known = {rank: theirs for part in found for rank, theirs in part.items()}
    return dict(sorted(known.items()))


def gpu_of(tensors: Iterable[Any]) -> torch.device | None:
    """The first CUDA device among those of `tensors`."""
    return next((tensor.device for tensor in tensors if getattr(tensor, "is_cuda", False)), None)


def groups_of(tensor: Any) -> list[Any]:
    """The process groups, one for each dimension of a mesh, whose processes hold parts of `tensor`."""
    if is_split(tensor):
        groups: list[Any] = tensor.device_mesh.get_all_groups()
        return groups
    group = getattr(tensor, "ds_process_group", None)  # of ZeRO-3
    return [] if group is None else [group]


def _distributed() -> Any:
    return sys.modules["torch.distributed"]


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever a class of someone else's raises
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
