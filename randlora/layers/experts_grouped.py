"""The products of all experts at once, with dense bases: a dozen launches in place of a dozen for every expert.

Experts share their bases, so that of the two products of an update one is the same for all tokens, and only the one
with the scaled bases ``S2 [experts, n*r, min_dim]`` is each expert's own. ``torch.nn.functional.grouped_mm`` computes
that one, and the one with the frozen weights, whatever number of tokens each expert has. It pays on a GPU:
:mod:`randlora.layers.experts_choice` says when. Bases of any kind are made dense for it.

Nothing is kept for backward but the tokens, the parameters and references. S2 of as many experts exists at a time as
fit into `workspace`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import calls
from ..private_torch import FakeTensor, in_transform, is_watched
from .experts_choice import ALIGNED, Sizes, is_suitable, pieces


class Call(NamedTuple):
    """What is no tensor with a gradient, as it is when forward runs.

    Attributes:
        counts: tokens of each expert. sizes: of an expert. scaling: of the update.
        transposed: the weight is ``[experts, in, out]``.
        room: bytes for what exists at a time.
        make_bases: gives A and B where they are not kept, as :func:`linear` takes them.
        alone: ``(x, lam, gamma, weight, bias)`` to the result, expert by expert, for derivatives of derivatives.
    """

    counts: Sequence[int]
    sizes: Sizes
    scaling: float
    transposed: bool
    room: int
    make_bases: Callable[[], tuple[Tensor, Tensor]]
    alone: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]

    @property
    def wide(self) -> bool:
        return self.sizes.in_features <= self.sizes.out_features


def is_possible(x: Tensor, counts: Sequence[int], weight: Tensor, bias: Tensor | None, in_features: int) -> bool:
    """Whether the products of ``x [tokens, in]`` with ``weight [experts, ...]`` can be computed so.

    Not under torch.func and forward mode, nor where the weight itself is trained.
    """
    if not is_suitable(x.device.type, x.dtype, len(weight), weight.shape[1:]):
        return False
    if isinstance(x, FakeTensor) or in_transform():
        return False
    trained = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    return (
        (weight.dtype, weight.device) == (x.dtype, x.device)
        and weight.is_contiguous()
        and weight.data_ptr() % ALIGNED == 0
        and x.shape == (sum(counts), in_features)
        and len(x) > 0
        and not trained
    )


def linear(
    x: Tensor, lam: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None,
    call: Call,
) -> Tensor:  # fmt: skip
    """``[tokens, out]``: each token's product with its expert's weight and update.

    Args:
        x: ``[tokens, in]``, sorted by expert. lam: ``[experts, r, n]``. gamma: ``[experts, n, min_dim]``.
        bias: ``[experts, out]`` or None. A, B: ``[r, 1, min_dim]`` and ``[max_dim, n, r]`` in the dtype of the tokens,
            or None, for those that are made for each pass.
    """
    result: Tensor = _Linear.apply(_aligned(x), lam, gamma, weight, bias, A, B, call)
    return result


def products(x: Tensor, counts: Sequence[int], weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """Those with the weights alone; differentiable."""
    y: Tensor = F.grouped_mm(_aligned(x), weight if transposed else weight.mT, offs=_ends(counts, x))
    if bias is not None:
        y = y + bias.repeat_interleave(_on(x.device, counts), dim=0, output_size=len(x))
    return y


def _aligned(t: Tensor) -> Tensor:
    """Contiguous rows that begin where the kernel can read them. A single row may have any distance to the next."""
    if t.is_contiguous() and t.data_ptr() % ALIGNED == 0 and t.stride() == (t.shape[1], 1):
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _ends(counts: Sequence[int], like: Tensor) -> Tensor:
    return _on(like.device, list(itertools.accumulate(counts)), torch.int32)


def _on(device: torch.device, numbers: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of numbers which does not wait for the device, as ``torch.tensor(..., device=device)`` does.

    Made on the CPU whatever the default device is.
    """
    return torch.tensor(numbers, dtype=dtype, device="cpu").to(device, non_blocking=True)


# ---- some of the experts ----


class _Some(NamedTuple):
    """Experts with tokens, one after the other: their numbers, the rows of their tokens, and where each one's end.

    None is without: what grouped_mm gives as the gradient of such a group is not zero on every GPU.
    """

    experts: list[int]
    rows: slice
    ends: Tensor

    def place(self, device: torch.device) -> slice | Tensor:
        """Where they are among all experts: an index."""
        first, last = self.experts[0], self.experts[-1]
        if last - first + 1 == len(self.experts):
            return slice(first, last + 1)
        return _on(device, self.experts)


def _in_turn(call: Call, like: Tensor) -> Iterator[_Some]:
    """All experts that have tokens, as many at a time as there is room for."""
    row = 0
    for experts in pieces(call.counts, call.sizes, call.room):
        counts = [call.counts[expert] for expert in experts]
        yield _Some(experts, slice(row, row + sum(counts)), _ends(counts, like))
        row += sum(counts)


class _Scaled(NamedTuple):
    """The scaled bases of some experts. The experts are so many more bases of one store, next to each other for every
    row p of S2, so that one call of the op makes them all and each expert's rows have one distance.
    """

    A: Tensor
    lam: Tensor  # [r, n * experts]
    gamma: Tensor  # [n * experts, m]
    scaling: float
    experts: int

    @classmethod
    def of(cls, A: Tensor, lam: Tensor, gamma: Tensor, scaling: float) -> _Scaled:
        experts, r, n = lam.shape
        by_base = lam.permute(1, 2, 0).reshape(r, -1), gamma.transpose(0, 1).reshape(n * experts, -1)
        return cls(A, *by_base, scaling, experts)

    def made(self, dtype: torch.dtype) -> Tensor:
        """``[experts, n*r, m]``"""
        S = calls.unique_base(self.A, self.lam, self.gamma, self.scaling, dtype)
        return S.reshape(-1, self.experts, S.shape[-1]).transpose(0, 1)

    def gradients(self, dS: Tensor, need_lambda: bool, need_gamma: bool) -> tuple[Tensor | None, Tensor | None]:
        """Of lambda ``[experts, r, n]`` and gamma ``[experts, n, m]``, from that of what `made` gives."""
        r, m = len(self.lam), dS.shape[-1]
        dS = dS.transpose(0, 1).reshape(r, -1, m)
        d_lam, d_gamma = calls.unique_base_backward(
            dS, self.A, self.lam, self.gamma, self.scaling, need_lambda, need_gamma
        )
        return (
            d_lam.reshape(r, -1, self.experts).permute(2, 0, 1) if need_lambda else None,
            d_gamma.reshape(-1, self.experts, m).transpose(0, 1) if need_gamma else None,
        )


# ---- the function ----


def _flat(A: Tensor | None, B: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """A, and B as ``[max_dim, n*r]``."""
    if A is None or B is None:
        A, B = call.make_bases()
    return A, B.flatten(1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lam: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None,
        B: Tensor | None, call: Call,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, lam, gamma, weight, bias, A, B)
        ctx.call = call
        A, B2 = _flat(A, B, call)
        y = products(x, call.counts, weight, bias, call.transposed)
        if is_watched():  # a mode may keep what grouped_mm gives, as selective checkpointing does: not to be written to
            y = y.clone()
        for some in _in_turn(call, x):
            place = some.place(lam.device)
            S = _Scaled.of(A, lam[place], gamma[place], call.scaling).made(x.dtype)
            if call.wide:
                y[some.rows].addmm_(F.grouped_mm(x[some.rows], S.mT, offs=some.ends), B2.t())
            else:
                y[some.rows] += F.grouped_mm(x[some.rows] @ B2, S, offs=some.ends)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lam, gamma, weight, bias, A, B = ctx.saved_tensors
        need_x, need_lambda, need_gamma, *_ = ctx.needs_input_grad
        call: Call = ctx.call
        if torch.is_grad_enabled() or in_transform():
            wanted = [t for t, need in zip((x, lam, gamma), ctx.needs_input_grad, strict=False) if need]
            with torch.enable_grad():
                y = call.alone(x, lam, gamma, weight, bias)
            found = iter(torch.autograd.grad(y, wanted, grad, create_graph=torch.is_grad_enabled()))
            return *(next(found) if need else None for need in (need_x, need_lambda, need_gamma)), *5 * (None,)
        grad = _aligned(grad)
        A, B2 = _flat(A, B, call)
        dx = d_lam = d_gamma = None
        if need_x:
            dx = products(grad, call.counts, weight, None, not call.transposed)
        if need_lambda:
            d_lam = torch.zeros_like(lam)
        if need_gamma:
            d_gamma = torch.zeros_like(gamma)
        for some in _in_turn(call, x):
            place = some.place(lam.device)
            scaled = _Scaled.of(A, lam[place], gamma[place], call.scaling)
            S, own, g = scaled.made(x.dtype), x[some.rows], grad[some.rows]
            dh = g @ B2 if call.wide else F.grouped_mm(g, S.mT, offs=some.ends)
            if dx is not None:
                if call.wide:
                    dx[some.rows] += F.grouped_mm(dh, S, offs=some.ends)
                else:
                    dx[some.rows].addmm_(dh, B2.t())
            if need_lambda or need_gamma:
                left, right = (dh, own) if call.wide else (own @ B2, g)
                dS = F.grouped_mm(left.t(), right, offs=some.ends)
                of_some = scaled.gradients(dS, need_lambda, need_gamma)
                for whole, part in zip((d_lam, d_gamma), of_some, strict=True):
                    if whole is not None and part is not None:
                        whole[place] = part.to(whole.dtype)
        return dx, d_lam, d_gamma, *5 * (None,)
