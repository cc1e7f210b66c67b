"""What operators of any kind need under ``torch.func``: a rule for ``vmap``, and a refusal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..private_torch import in_transform, jvp_levels


def once_per_sample(op: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """A vmap rule that runs `op` once per sample: right for every batching, at the memory of one sample's workspace."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Any, Any]:
        samples = [
            op(*(a.select(d, i) if d is not None else a for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


def refuse_forward_over_forward() -> None:
    """PyTorch leaves the outer derivative out where a custom function is differentiated forward twice."""
    if jvp_levels() > 1:
        raise RuntimeError(
            "randlora's ops cannot be differentiated forward twice (jvp of jvp, jacfwd of jacfwd): take "
            "torch.func.hessian, jacfwd of jacrev, or jacrev of either"
        )


def refuse_tangent(grad: Tensor) -> None:
    """Where a backward runs in forward mode and its forward did not, the op's own autograd would drop the tangent."""
    if in_transform() and forward_ad.unpack_dual(grad).tangent is not None:
        raise NotImplementedError(
            "randlora: this backward can be differentiated in forward mode only where its forward was called inside of "
            "torch.autograd.forward_ad.dual_level(), too"
        )
