"""Parameters that DeepSpeed's ZeRO-3 partitions: each process keeps a part, and a module's calls have them whole.

Between calls such a parameter is empty. It is known by the attributes that DeepSpeed gives it, ``ds_id``, ``ds_shape``
and ``ds_process_group``, so that DeepSpeed need not be imported here.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of the whole tensor."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)
    return shape


def is_parameter(tensor: Any) -> bool:
    """Whether `tensor` is such a parameter, be it whole at the moment or not."""
    return hasattr(tensor, "ds_id")


def is_partitioned(tensor: Any) -> bool:
    """Whether `tensor` is such a parameter, and not whole at the moment."""
    return isinstance(tensor, Tensor) and tensor.shape != shape_of(tensor)


@contextlib.contextmanager
def gathered(tensors: Iterable[Any]) -> Iterator[None]:
    """Those of `tensors` that are partitioned are whole in here, for reading. All processes must enter it then."""
    parts = [tensor for tensor in tensors if is_partitioned(tensor)]
    with sys.modules["deepspeed"].zero.GatheredParameters(parts) if parts else contextlib.nullcontext():
        yield


def require_whole(tensor: Tensor, what: str, purpose: str, writing: bool = False) -> None:
    """Raises ``ValueError`` if `tensor` is partitioned.

    Args:
        writing: also if it is whole only because a call has left it so: what is written into it would be lost.
    """
    if is_partitioned(tensor) or (writing and is_parameter(tensor) and not _is_held(tensor)):
        raise ValueError(
            f"{what} is kept in parts by DeepSpeed's ZeRO-3: it has no numbers {purpose} but in calls of DeepSpeed's "
            "engine and inside `with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):`"
        )


def _is_held(tensor: Tensor) -> bool:
    """Whether ``GatheredParameters`` of the user's holds it; older versions of DeepSpeed do not tell."""
    module = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    mark = getattr(module, "DS_Z3_GATHERED_PARAM_CONTEXT_DEPTH_ATTR", None)
    return mark is None or getattr(tensor, mark, 0) > 0


def is_hook(hook: Any) -> bool:
    """Whether a module's `hook` is one of those by which DeepSpeed gathers parameters."""
    return str(getattr(hook, "__module__", "")).partition(".")[0] == "deepspeed"


class GatheredForCalls:
    """Mixin of a module whose calls use the parameters of :meth:`trained_parts`, which are never called themselves.

    DeepSpeed gathers for a call what the module holds itself, and what :meth:`ds_external_parameters` names. It gives
    each module a method of that name, and ``deepspeed.zero.register_external_parameter`` a dict to write to, unless the
    module has that dict already.
    """

    @property
    def _external_params(self) -> dict[int, nn.Parameter]:
        registered: dict[int, nn.Parameter] = self.__dict__.setdefault("_registered_parameters", {})
        return registered

    def ds_external_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Ids and parameters. An adapter that was added after DeepSpeed took the model has ordinary ones."""
        yield from self._external_params.items()
        for part in self.trained_parts():
            # Not part.values(): whatever is read by key while the model runs is registered for the module that runs.
            yield from ((id(p), p) for p in part._parameters.values() if p is not None and is_parameter(p))

    def trained_parts(self) -> tuple[nn.ParameterDict, ...]:
        raise NotImplementedError
