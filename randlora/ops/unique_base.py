"""The scaled base under autograd, forward-mode AD and ``torch.func``.

``torch.ops.randlora.*`` is registered by the compiled module (schemas in ``csrc/ops.cpp``). Nothing is saved for
backward but the inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..private_torch import graph_break, in_transform
from . import calls
from .transforms import once_per_sample, refuse_forward_over_forward

# Backward formulas, shared by the raw ops (register_autograd) and by the autograd.Functions below: torch.func needs the
# latter, as ops with registered autograd do not run under its transforms.


def _setup_unique_base(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    A, randlora_lambda, randlora_gamma, *options = inputs
    ctx.save_for_backward(A, randlora_lambda, randlora_gamma)
    ctx.scale = options[0] if options else 1.0


def _unique_base_gradients(
    ctx: Any, grad: Tensor, backward_op: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor | None, ...]:
    _, need_lambda, need_gamma, *_ = ctx.needs_input_grad
    dlambda, dgamma = backward_op(grad, *ctx.saved_tensors, ctx.scale, need_lambda, need_gamma)
    return None, dlambda if need_lambda else None, dgamma if need_gamma else None, None, None


def _setup_unique_base_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, A, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma = inputs
    ctx.save_for_backward(grad, A, randlora_lambda, randlora_gamma)
    ctx.scale, ctx.need = scale, (need_lambda, need_gamma)


def _unique_base_second_gradients(
    ctx: Any,
    v_lambda: Tensor,
    v_gamma: Tensor,
    forward_op: Callable[..., Tensor],
    backward_op: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor | None, ...]:
    # dlambda and dgamma are linear in grad and in the other factor, so their gradients are the same two ops again.
    grad, A, randlora_lambda, randlora_gamma = ctx.saved_tensors
    need_grad, _, need_lambda, need_gamma, *_ = ctx.needs_input_grad
    from_lambda, from_gamma = ctx.need
    d_grad = d_lambda = d_gamma = None
    if need_grad and from_lambda:
        d_grad = forward_op(A, v_lambda, randlora_gamma, ctx.scale, grad.dtype)
    if need_grad and from_gamma:
        other = forward_op(A, randlora_lambda, v_gamma, ctx.scale, grad.dtype)
        d_grad = other if d_grad is None else d_grad + other
    if need_gamma and from_lambda:
        _, d_gamma = backward_op(grad, A, v_lambda, randlora_gamma, ctx.scale, False, True)
    if need_lambda and from_gamma:
        d_lambda, _ = backward_op(grad, A, randlora_lambda, v_gamma, ctx.scale, True, False)
    return d_grad, None, d_lambda, d_gamma, None, None, None


def _forward_and_backward() -> tuple[Callable[..., Tensor], Callable[..., tuple[Tensor, Tensor]]]:
    """The ops, or the functions below where a backward runs in forward mode and its forward did not: the ops alone
    would drop the tangent.
    """
    if in_transform():
        return UniqueBaseGrad.apply, _unique_base_backward
    return calls.unique_base, calls.unique_base_backward


torch.library.register_autograd(
    "randlora::unique_base",
    lambda ctx, grad: _unique_base_gradients(ctx, grad, _forward_and_backward()[1]),
    setup_context=_setup_unique_base,
)
torch.library.register_autograd(
    "randlora::unique_base_backward",
    lambda ctx, v_lambda, v_gamma: _unique_base_second_gradients(ctx, v_lambda, v_gamma, *_forward_and_backward()),
    setup_context=_setup_unique_base_backward,
)
torch.library.register_vmap("randlora::unique_base", once_per_sample(calls.unique_base))
torch.library.register_vmap("randlora::unique_base_backward", once_per_sample(calls.unique_base_backward))


class _UniqueBase(torch.autograd.Function):
    @staticmethod
    def forward(
        randlora_A: Tensor,
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if torch.compiler.is_compiling() and in_transform():
            graph_break()  # torch.compile would take this for all of the function, and drop tangents
        return calls.unique_base(randlora_A, randlora_lambda, randlora_gamma, scale, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _setup_unique_base(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gradients = _unique_base_gradients(ctx, grad_output, _unique_base_backward)
        return gradients[: len(ctx.needs_input_grad)]

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return once_per_sample(UniqueBaseGrad.apply)(info, in_dims, *args)


class _ForwardModeUniqueBase(_UniqueBase):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _setup_unique_base(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])
        ctx.dtype = output.dtype

    @staticmethod
    def jvp(ctx: Any, A_t: None, lambda_t: Tensor | None, gamma_t: Tensor | None, *_: None) -> Tensor:
        refuse_forward_over_forward()
        A, lam, gamma = ctx.saved_tensors
        parts = [
            UniqueBaseGrad.apply(A, *factors, ctx.scale, ctx.dtype)
            for tangent, factors in ((lambda_t, (lambda_t, gamma)), (gamma_t, (lam, gamma_t)))
            if tangent is not None
        ]
        if parts:
            total: Tensor = functools.reduce(torch.add, parts)
            return total
        zeros: Tensor = A.new_zeros((*lam.shape, A.shape[2]), dtype=ctx.dtype)
        return zeros


class UniqueBaseGrad(_UniqueBase):
    """``S[k,i,j] = scale * lambda[k,i] * A[k,0,j] * gamma[i,j]``, derivatives by lambda and gamma only (A is fixed).

    PEFT's function of the same name; :func:`randlora.functional.unique_base` is its documented face.

    ``UniqueBaseGrad.apply(randlora_A, randlora_lambda, randlora_gamma)`` takes ``[r, 1, m]``, ``[r, n]``, ``[n, m]`` in
    float64, float32, bfloat16 or float16 and returns ``[r, n, m]`` in their promoted dtype. Sums are fp32 (fp64 for
    fp64). Raises ``ValueError`` for shapes or devices and ``TypeError`` for dtypes that do not fit. Works under
    ``torch.func``, ``torch.compile``, double backward and forward-mode AD.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        # torch.compile refuses functions that have a rule for forward-mode AD.
        return (_UniqueBase if torch.compiler.is_compiling() else _ForwardModeUniqueBase).apply(*args)


def _unique_base_backward(*args: Any) -> Any:
    return (_UniqueBaseBackward if torch.compiler.is_compiling() else _ForwardModeUniqueBaseBackward).apply(*args)


class _UniqueBaseBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        grad: Tensor,
        A: Tensor,
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        scale: float,
        need_lambda: bool,
        need_gamma: bool,
    ) -> tuple[Tensor, Tensor]:
        return calls.unique_base_backward(grad, A, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _setup_unique_base_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, v_lambda: Tensor, v_gamma: Tensor) -> tuple[Tensor | None, ...]:
        return _unique_base_second_gradients(ctx, v_lambda, v_gamma, UniqueBaseGrad.apply, _unique_base_backward)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> Any:
        return once_per_sample(_unique_base_backward)(info, in_dims, *args)


class _ForwardModeUniqueBaseBackward(_UniqueBaseBackward):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _setup_unique_base_backward(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(
        ctx: Any, grad_t: Tensor | None, A_t: None, lambda_t: Tensor | None, gamma_t: Tensor | None, *_: None
    ) -> tuple[Tensor, Tensor]:
        refuse_forward_over_forward()
        grad, A, lam, gamma = ctx.saved_tensors
        need_lambda, need_gamma = ctx.need
        d_lambda, d_gamma = (
            lam.new_zeros(lam.shape if need_lambda else 0),
            gamma.new_zeros(gamma.shape if need_gamma else 0),
        )
        for tangent, places, needs in (
            (grad_t, (grad_t, A, lam, gamma), (need_lambda, need_gamma)),
            (lambda_t, (grad, A, lambda_t, gamma), (False, need_gamma)),
            (gamma_t, (grad, A, lam, gamma_t), (need_lambda, False)),
        ):
            if tangent is None or not any(needs):
                continue
            from_lambda, from_gamma = _unique_base_backward(*places, ctx.scale, *needs)
            d_lambda = d_lambda + from_lambda if needs[0] else d_lambda
            d_gamma = d_gamma + from_gamma if needs[1] else d_gamma
        return d_lambda, d_gamma
