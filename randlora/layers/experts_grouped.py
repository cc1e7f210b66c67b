"""The products of all experts at once, with dense bases: a dozen launches in place of a dozen for every expert.

Experts share their bases, so that of the two products of an update one is the same for all tokens, and only the one
with the scaled bases ``S2 [experts, n*r, min_dim]`` is each expert's own. ``torch.nn.functional.grouped_mm`` computes
that one, and the one with the frozen weights, whatever number of tokens each expert has. It pays on a GPU, where an
expert's few tokens take a fraction of the time that the host needs to call a layer: see :func:`is_cheaper`. Bases of
any kind are made dense for it.

Nothing is kept for backward but the tokens, the parameters and references. S2 of as many experts exists at a time as
fit into `workspace`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import planner
from ..costs.lists import Lists
from ..ops import calls
from ..private_torch import FakeTensor, in_transform

# Where grouped_mm is one kernel: with others it is a loop, and waits for the device.
DEVICES, DTYPES = ("cuda",), (torch.bfloat16,)
ALIGNED = 16  # bytes, of rows: what the tensor memory accelerator takes
MOST_GROUPS = 1023
WORKSPACE = 512 << 20  # bytes, where a layer has no bound of its own
# What the host spends on one expert's call, forward and backward, in multiply-adds that the device does meanwhile:
# 0.1 and 0.3 ms (bench/NOTES-cuda.md) at the rate that planner.BALANCE has.
HOST = (40 * 10**9, 120 * 10**9)
LAUNCHES = 3  # how many times that the host spends on all experts at once


class Call(NamedTuple):
    """What is no tensor with a gradient.

    Attributes:
        counts: tokens of each expert.
        make_bases: gives A and B where they are not kept, as :func:`linear` takes them.
        scaling: of the update. wide: in_features <= out_features. transposed: the weight is ``[experts, in, out]``.
        workspace: bytes. alone: the same of tokens, lambda and gamma, expert by expert, for second derivatives.
    """

    counts: Sequence[int]
    make_bases: Callable[[], tuple[Tensor, Tensor]]
    scaling: float
    wide: bool
    transposed: bool
    workspace: int
    alone: Callable[[Tensor, Tensor, Tensor], Tensor]


def is_possible(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
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
        and x.shape[0] > 0
        and not trained
    )


def is_suitable(device_type: str, dtype: torch.dtype, experts: int, sizes: Sequence[int]) -> bool:
    """Whether grouped_mm is one kernel for matrices of these numbers of rows and columns."""
    aligned = all(size * dtype.itemsize % ALIGNED == 0 for size in sizes)
    return device_type in DEVICES and dtype in DTYPES and experts <= MOST_GROUPS and aligned


def is_cheaper(
    counts: Sequence[int],
    sizes: tuple[int, int, int, int],
    dtype: torch.dtype,
    device_type: str,
    form: Lists | str | None,
    need_x: bool,
    need_parameters: bool,
) -> bool:
    """Whether this takes less time than a call for each expert that has tokens.

    Args:
        sizes: in_features, out_features, n and r. form, need_x, need_parameters: as for
            :func:`randlora.planner.choose`.
    """
    hit = sum(1 for count in counts if count)

    def totals(form: Lists | str | None) -> dict[str, tuple[int, int]]:
        """Of one expert."""
        return planner.totals_of(
            -(-sum(counts) // hit), *sizes, dtype, dtype, device_type, form=form, need_x=need_x,
            need_parameters=need_parameters,
        )  # fmt: skip

    if not hit:
        return False
    passes, by_itself, factored = 1 + (need_x or need_parameters), totals(form).values(), totals(None)["factored"]
    alone = sum(hit * max(HOST[i], min(each[i] for each in by_itself)) for i in range(passes))
    together = sum(max(LAUNCHES * HOST[i], hit * factored[i]) for i in range(passes))
    return together < alone


def temporaries(counts: Sequence[int], sizes: tuple[int, int, int, int], itemsize: int, made: bool) -> int:
    """Bytes that a step takes beside what it returns and keeps; `made`: bases that are not kept dense, too."""
    in_features, out_features, n, r = sizes
    m, M, P = min(in_features, out_features), max(in_features, out_features), n * r
    experts = min(at_once(P * m * itemsize), sum(1 for count in counts if count))
    rows = sum(sorted(counts, reverse=True)[:experts])
    # S2, its gradient, and that in the order of the op; the hidden numbers and their gradient; lambda, gamma in that
    # order, and their gradients.
    return itemsize * (3 * experts * P * m + 2 * rows * P + made * P * M) + 8 * experts * n * (m + r)


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
        y = y + bias.repeat_interleave(_on(x.device, torch.tensor(counts)), dim=0, output_size=len(x))
    return y


def _aligned(t: Tensor) -> Tensor:
    """Contiguous rows that begin where the kernel can read them."""
    t = t.contiguous()
    return t.clone() if t.data_ptr() % ALIGNED else t


def _ends(counts: Sequence[int], like: Tensor) -> Tensor:
    return _on(like.device, torch.tensor(counts).cumsum(0, dtype=torch.int32))


def _on(device: torch.device, numbers: Tensor) -> Tensor:
    """Without waiting for the device, as torch.tensor(..., device=device) does."""
    return numbers.to(device, non_blocking=True)


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
        return _on(device, torch.tensor(self.experts))


def at_once(bytes_of_one: int, workspace: int = 0) -> int:
    """Of how many experts the scaled bases exist at a time, so that they fit with their gradients."""
    return max(1, (workspace or WORKSPACE) // (4 * bytes_of_one))


def _in_turn(call: Call, like: Tensor, bytes_of_one: int) -> Iterator[_Some]:
    """All experts that have tokens, as many at a time as fit: S2, its gradient, and a copy of that in another order."""
    most = at_once(bytes_of_one, call.workspace)
    hit = [expert for expert, count in enumerate(call.counts) if count]
    row = 0
    for first in range(0, len(hit), most):
        experts = hit[first : first + most]
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
        ctx.save_for_backward(x, lam, gamma, weight, A, B)
        ctx.call = call
        A, B2 = _flat(A, B, call)
        y = products(x, call.counts, weight, bias, call.transposed)
        for some in _in_turn(call, x, B2.shape[1] * gamma.shape[-1] * x.element_size()):
            place = some.place(lam.device)
            S = _Scaled.of(A, lam[place], gamma[place], call.scaling).made(x.dtype)
            if call.wide:
                y[some.rows].addmm_(F.grouped_mm(x[some.rows], S.mT, offs=some.ends), B2.t())
            else:
                y[some.rows] += F.grouped_mm(x[some.rows] @ B2, S, offs=some.ends)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, lam, gamma, weight, A, B = ctx.saved_tensors
        need_x, need_lambda, need_gamma, *_ = ctx.needs_input_grad
        call: Call = ctx.call
        if torch.is_grad_enabled():
            wanted = [t for t, need in zip((x, lam, gamma), ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(call.alone(x, lam, gamma), wanted, grad, create_graph=True))
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
        for some in _in_turn(call, x, B2.shape[1] * gamma.shape[-1] * x.element_size()):
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
