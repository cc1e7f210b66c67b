"""RandLoRA in plain PyTorch, as well as it can be written: what compiled code has to beat.

``linear.py`` measures the formulations one by one; in whole models each call takes the one with the fewest
multiply-adds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def factors(B2: Tensor, S2: Tensor, up: bool) -> tuple[Tensor, Tensor]:
    """L ``[out, P]`` and R ``[P, in]`` with ``dW = L @ R``. `up`: ``in <= out``."""
    return (B2, S2) if up else (S2.T, B2.T)


def scaled_base(A: Tensor, lam: Tensor, gamma: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return ((lam * scaling)[:, :, None] * A * gamma).flatten(0, 1).to(dtype)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B2: Tensor, lam: Tensor, gamma: Tensor,
    scaling: float, up: bool, strategy: str,
) -> Tensor:  # fmt: skip
    """``x [T, in]`` to ``[T, out]``; ``A [r, 1, m]``, ``B2 [M, n*r]``, ``lam [r, n]``, ``gamma [n, m]``."""
    L, R = factors(B2, scaled_base(A, lam, gamma, scaling, x.dtype), up)
    if strategy == "merged":
        return F.linear(x, torch.addmm(weight, L, R), bias)
    y = F.linear(x, weight, bias)
    return torch.addmm(y, x @ R.T, L.T) if strategy == "factored" else torch.addmm(y, x, (L @ R).T)


class Rebuilding(torch.autograd.Function):
    """:func:`forward` that keeps its inputs only and rebuilds the rest in backward, as randlora does."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, B2, lam, gamma, scaling, up, strategy):
        ctx.save_for_backward(x, weight, A, B2, lam, gamma)
        ctx.settings = scaling, up, strategy
        return forward(x, weight, bias, A, B2, lam, gamma, scaling, up, strategy)

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, A, B2, lam, gamma = ctx.saved_tensors
        scaling, up, strategy = ctx.settings
        L, R = factors(B2, scaled_base(A, lam, gamma, scaling, x.dtype), up)
        if strategy == "factored":
            dh = g @ L
            dx = torch.addmm(g @ weight, dh, R)
            dS2 = dh.T @ x if up else (x @ B2).T @ g
        else:
            dx = g @ torch.addmm(weight, L, R) if strategy == "merged" else torch.addmm(g @ weight, g, L @ R)
            G = g.T @ x
            dS2 = B2.T @ G if up else (G @ B2).T
        # One product of the gradient's size, then batched matrix-vector products over the bases.
        t = ((dS2 * scaling).to(lam.dtype).view(*lam.shape, -1) * A.to(lam.dtype)).transpose(0, 1)
        dlam = torch.bmm(t, gamma[:, :, None])[:, :, 0].T
        dgamma = torch.bmm(lam.T[:, None], t)[:, 0]
        return dx, None, None, None, None, dlam, dgamma, None, None, None


@functools.cache
def compiled() -> Callable[..., Tensor]:
    """:func:`forward` under torch.compile, which differentiates it too. Compiled anew for every layer size."""
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    return torch.compile(forward, fullgraph=True, dynamic=False)


def cheapest(T: int, M: int, m: int, P: int, dtype: torch.dtype) -> str:
    """By the multiply-adds of forward and backward, in units of the weight's size ``M * m``, the frozen part left out.

    In 16 bits the merged form rounds small updates away: it is no way to compute the same thing.
    """
    costs = {"factored": T * P * (1 / m + 1 / M) * 2.5, "materialized": 3 * T + 3 * P}
    if dtype not in (torch.bfloat16, torch.float16):
        costs["merged"] = T + 3 * P
    return min(costs, key=costs.get)


class Linear(nn.Module):
    """Wraps an ``nn.Linear``; ``A`` and ``B2`` are tensors that layers share.

    Parameters are PEFT's: ``randlora_lambda [r, n]`` zeros, ``randlora_gamma [n, m]`` ``1 / max(in, out)``, fp32.

    Args:
        function: ``"rebuilding"``, or ``"autograd"``: PyTorch differentiates :func:`forward` and keeps what it likes
            (merged: W + dW, and S2), or ``"compiled"``: the same under torch.compile.
        strategy: None for the :func:`cheapest` of each call.
    """

    def __init__(
        self, base_layer: nn.Linear, A: Tensor, B2: Tensor, scaling: float, function: str, strategy: str | None = None
    ) -> None:
        super().__init__()
        weight = base_layer.weight.requires_grad_(False)
        M, m, r = max(weight.shape), min(weight.shape), A.shape[0]
        self.base_layer, self.scaling, self.function, self.strategy = base_layer, scaling, function, strategy
        self.up = weight.shape[1] <= weight.shape[0]
        self.register_buffer("A", A[:, :, :m], persistent=False)
        self.register_buffer("B2", B2, persistent=False)
        self.randlora_lambda = nn.Parameter(torch.zeros(r, B2.shape[1] // r, device=weight.device))
        self.randlora_gamma = nn.Parameter(torch.full((B2.shape[1] // r, m), 1 / M, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.base_layer.weight, self.base_layer.bias
        rows = x.reshape(-1, x.shape[-1])
        strategy = self.strategy or cheapest(len(rows), max(weight.shape), min(weight.shape), self.B2.shape[1], x.dtype)
        function = {"rebuilding": Rebuilding.apply, "autograd": forward}.get(self.function) or compiled()
        y = function(
            rows, weight, bias, self.A, self.B2, self.randlora_lambda, self.randlora_gamma, self.scaling, self.up,
            strategy,
        )  # fmt: skip
        return y.unflatten(0, x.shape[:-1])
