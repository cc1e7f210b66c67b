"""The update of a part of a layer: of some of its outputs, or from some of its inputs.

A shard of dW takes rows of B and columns of A and gamma, all of P. The side that gamma belongs to need not be the
smaller one of the shard: a square layer's weight, cut in its outputs, is ``[d / N, d]`` and still ``B2 @ S2`` with S2
``[P, d]``. The operator of whole layers tells the sides by their sizes, so this is done by two plain products.

With ``first`` and ``second`` for what the input passes through, S2 and B2^T where gamma belongs to the inputs, B2^T and
S2 where it belongs to the outputs:

    factored      y = (x @ first^T) @ second                T P (in + out)
    materialized  y = x @ (first^T @ second)                P in out + T in out
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops import calls


class ShardCall(NamedTuple):
    """What is fixed in a call: the sizes of the bases ``A [r, 1, c]`` and ``B [rows, n, r]``, and how to compute."""

    c: int
    rows: int
    r: int
    n: int
    scale: float
    gamma_is_of_inputs: bool
    dtype: torch.dtype  # to compute in
    strategy: str  # auto, factored or materialized
    dropout: float = 0.0
    seed: Tensor | None = None
    draw: Callable[[], tuple[Tensor, Tensor]] | None = None  # of bases that are not kept: makes them

    @property
    def features(self) -> tuple[int, int]:
        """Of the input and of the output."""
        return (self.c, self.rows) if self.gamma_is_of_inputs else (self.rows, self.c)

    def factors(self, A: Tensor, B: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """``first [P, in]`` and ``second [P, out]``."""
        P = self.n * self.r
        S2 = calls.unique_base(A, lam, gamma, self.scale, self.dtype).view(P, self.c)
        B2t = B.view(self.rows, P).t()
        return (S2, B2t) if self.gamma_is_of_inputs else (B2t, S2)

    def dropped(self, rows: Tensor) -> Tensor:
        if self.seed is None:
            return rows
        return calls.dropout(rows.contiguous(), self.seed, self.dropout)

    def is_factored(self, tokens: int, backward: bool) -> bool:
        """Whether that takes fewer multiply-adds, where the caller has not chosen."""
        if self.strategy != "auto":
            return self.strategy == "factored"
        (into, out), P = self.features, self.n * self.r
        if not backward:
            return tokens * P * (into + out) <= (P + tokens) * into * out
        of_hidden = 2 * self.c + self.rows * (1 if self.gamma_is_of_inputs else 2)
        return tokens * P * of_hidden <= 2 * (P + tokens) * into * out


def shard_update(
    x: Tensor, lam: Tensor, gamma: Tensor, bases: tuple[Tensor, Tensor] | tuple[None, None], call: ShardCall
) -> Tensor:
    """``[..., out]`` in `call`'s dtype, from x ``[..., in]``, lambda ``[r, n]`` and the part of gamma ``[n, c]``.

    For backward it keeps x as it is, and references to the others. It can be differentiated once. `bases`: A and B in
    `call`'s dtype; none where `call` draws them.
    """
    y: Tensor = _ShardUpdate.apply(x, lam, gamma, *bases, call)
    return y


def shard_matrix(lam: Tensor, gamma: Tensor, bases: tuple[Tensor, Tensor], call: ShardCall) -> Tensor:
    """The part's dW, ``[out, in]``."""
    into, out = call.features
    if not into * out:
        return lam.new_zeros(out, into, dtype=call.dtype)
    first, second = call.factors(*bases, lam, gamma)
    return second.t() @ first


class _ShardUpdate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lam: Tensor, gamma: Tensor, A: Tensor | None, B: Tensor | None, call: ShardCall
    ) -> Tensor:
        ctx.save_for_backward(x, lam, gamma, A, B)
        ctx.call = call
        into, out = call.features
        if not x.numel() * out:  # no tokens, or a rank for which nothing of the weight is left
            return x.new_zeros((*x.shape[:-1], out), dtype=call.dtype)
        with torch.autocast(x.device.type, enabled=False):
            rows = call.dropped(x.to(call.dtype).reshape(-1, into))
            if call.draw is not None:
                A, B = call.draw()
            assert A is not None and B is not None
            first, second = call.factors(A, B, lam, gamma)
            if call.is_factored(len(rows), backward=False):
                y = (rows @ first.t()) @ second
            else:
                y = rows @ (first.t() @ second)
        return y.view(*x.shape[:-1], out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lam, gamma, A, B = ctx.saved_tensors
        call: ShardCall = ctx.call
        need_x, need_lambda, need_gamma, *_ = ctx.needs_input_grad
        into, out = call.features
        if not x.numel() * out:
            needs = need_x, need_lambda, need_gamma
            zeros = [torch.zeros_like(t) if need else None for t, need in zip((x, lam, gamma), needs, strict=True)]
            return *zeros, None, None, None
        with torch.autocast(x.device.type, enabled=False):
            g = grad.to(call.dtype).reshape(-1, out)
            need_parameters = need_lambda or need_gamma
            rows = call.dropped(x.to(call.dtype).reshape(-1, into)) if need_parameters else None
            if call.draw is not None:
                A, B = call.draw()
            first, second = call.factors(A, B, lam, gamma)
            if call.is_factored(len(g), backward=True):
                dx, dS2 = _factored_backward(g, rows, first, second, need_x, call.gamma_is_of_inputs)
            else:
                dx, dS2 = _materialized_backward(g, rows, first, second, need_x, call.gamma_is_of_inputs)
            d_lambda = d_gamma = None
            if dS2 is not None:
                dS = dS2.view(call.r, call.n, call.c)
                found = calls.unique_base_backward(dS, A, lam, gamma, call.scale, need_lambda, need_gamma)
                d_lambda, d_gamma = found[0] if need_lambda else None, found[1] if need_gamma else None
            d_x = None if dx is None else call.dropped(dx).to(x.dtype).view(x.shape)
        return d_x, d_lambda, d_gamma, None, None, None


def _factored_backward(
    g: Tensor, x: Tensor | None, first: Tensor, second: Tensor, need_x: bool, gamma_is_of_inputs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of x and S2; x is None where that of S2 is not needed."""
    dh = g @ second.t() if need_x or gamma_is_of_inputs else None
    dx = dh @ first if dh is not None and need_x else None
    if x is None:
        return dx, None
    if gamma_is_of_inputs:
        assert dh is not None
        return dx, _accumulated(dh.t(), x)
    return dx, _accumulated((x @ first.t()).t(), g)


def _materialized_backward(
    g: Tensor, x: Tensor | None, first: Tensor, second: Tensor, need_x: bool, gamma_is_of_inputs: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The same through dW and its gradient."""
    dx = g @ (second.t() @ first) if need_x else None
    if x is None:
        return dx, None
    G = g.t() @ x if g.is_cuda else _accumulated(g.t(), x)  # 16 bits keep the next product on the tensor cores
    B2t = second if gamma_is_of_inputs else first
    return dx, _accumulated(B2t, G if gamma_is_of_inputs else G.t())


def _accumulated(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` in fp32 (fp64 for fp64): what is reduced further must not be rounded to 16 bits first."""
    if a.dtype == torch.float64 or (a.dtype == b.dtype == torch.float32):
        return a @ b
    if a.is_cuda and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
