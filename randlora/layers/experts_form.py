"""Fused experts: modules of which one parameter holds the weights of all experts, ``[experts, out, in]``.

transformers 5 gives most of them one form (``transformers.integrations.moe.use_experts_implementation``): the names of
the parameters, flags that say how they lie, and a function for what happens between two products. A module that has
this form, be it of a class of transformers or of the user's, can be computed expert by expert with updates. It is
recognised by its attributes, so that transformers need not be imported here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require_dtype
from ..distributed import zero3
from ..distributed.fsdp import is_sharded
from ..distributed.gathering import is_dtensor
from ..distributed.parallelized import has_plan_around
from ..private_torch import FakeTensor
from .base_layer import name_of
from .ordinary import forward_is_replaced

_FLAGS = ("has_gate", "has_bias", "is_transposed")
FORM = (
    "only the experts modules of transformers 5, and of classes of your own with its decorator transformers."
    "integrations.moe.use_experts_implementation, say how they compute with their parameters"
)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module has the form of transformers' fused experts."""
    return (
        all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS)
        and isinstance(getattr(module, "num_experts", None), int)
        and hasattr(type(module).forward, "__wrapped__")  # not a class that is derived from one, with its own forward
    )


def weight_names(experts: Any) -> tuple[str, str]:
    """The parameters that hold the weights of the first and of the second product."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def check_base(experts: Any, names: tuple[str, ...]) -> None:
    """Raises ``TypeError`` or ``ValueError`` where the parameters `names` of a module cannot be adapted."""
    what = name_of(experts)
    if not is_fused_experts(experts):
        raise TypeError(f"a {what} is no module of fused experts that can be adapted: {FORM}")
    known = weight_names(experts)
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no weight of the experts, a {what}: it has {' and '.join(known)}")
    if getattr(experts, "_is_expert_parallel", False) or has_plan_around(experts):
        raise ValueError(
            f"the experts, a {what}, are spread over ranks by a parallel plan, which experts do not support: leave "
            "them out of the plan, or shard the model with fully_shard after it is adapted"
        )
    if is_sharded(experts):
        raise ValueError(
            f"the experts, a {what}, are sharded: fully_shard would not know their adapters. Add these before"
        )
    if "_hf_hook" not in vars(experts) and forward_is_replaced(experts):
        raise ValueError(f"the experts, a {what}, have a forward of their own, which would not be called")
    require_no_hooks(experts)
    for name in known:
        _check_weight(experts, name)


def require_no_hooks(experts: nn.Module) -> None:
    """Raises ``ValueError`` for hooks that would not run, as the module is not called while an adapter acts."""
    hooks = *experts._forward_hooks.values(), *experts._forward_pre_hooks.values()
    if any(not zero3.is_hook(hook) for hook in hooks):
        raise ValueError(
            f"the experts, a {name_of(experts)}, have hooks, which would not run while adapters act: remove them and "
            "register them on the adapted module"
        )


def _check_weight(experts: Any, name: str) -> None:
    what = f"{name} of the experts, a {name_of(experts)},"
    weight = experts._parameters.get(name)
    if is_dtensor(weight):
        raise ValueError(f"{what} is cut over ranks by a parallel plan: this is not supported for experts")
    if type(weight) not in (nn.Parameter, FakeTensor) and not zero3.is_parameter(weight):
        raise TypeError(f"{what} must be an ordinary torch.nn.Parameter, got {type(weight).__name__}")
    assert isinstance(weight, Tensor)
    require_dtype(f"the dtype of {what[:-1]}", weight.dtype)
    shape = zero3.shape_of(weight)
    if len(shape) != 3 or shape[0] != experts.num_experts or 0 in shape:
        raise ValueError(
            f"{what} must have shape [experts, ...] with {experts.num_experts} experts and three dimensions, none of "
            f"them 0, got {list(shape)}"
        )


def sizes(experts: Any, name: str) -> tuple[int, int]:
    """in_features and out_features of one expert's weight."""
    _, first, last = zero3.shape_of(experts._parameters[name])
    return (first, last) if experts.is_transposed else (last, first)


def counts_of(ids: Tensor, num_experts: int) -> list[int]:
    """How often each expert is in `ids`, as numbers of Python, for which a GPU is waited for once.

    Larger ids are nobody's: expert parallelism marks so what other ranks compute. Without numbers (on meta, in fake
    tensors) all experts get equally many.
    """
    if ids.is_meta or isinstance(ids, FakeTensor):
        each, more = divmod(ids.numel(), num_experts)
        return [each + (i < more) for i in range(num_experts)]
    counts: list[int] = torch.bincount(ids, minlength=num_experts)[:num_experts].tolist()
    return counts
