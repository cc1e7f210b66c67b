"""The compiled ops under PyTorch's composable machinery: fake kernels, autograd, vmap.

``torch.ops.randlora.*`` is registered by the compiled module (schemas in ``csrc/ops.cpp``); this file adds what lets
the ops run under ``torch.compile``, ``torch.func`` and double backward. Nothing is saved for backward but the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ops = torch.ops.randlora


# ---- unique_base -----------------------------------------------------------------------------------------------


@torch.library.register_fake("randlora::unique_base")
def _(A, randlora_lambda, randlora_gamma, scale=1.0, dtype=None):
    if dtype is None:
        dtype = torch.promote_types(A.dtype, torch.promote_types(randlora_lambda.dtype, randlora_gamma.dtype))
    return A.new_empty((A.shape[0], randlora_gamma.shape[0], A.shape[2]), dtype=dtype)


@torch.library.register_fake("randlora::unique_base_backward")
def _(grad, A, randlora_lambda, randlora_gamma, scale=1.0, need_lambda=True, need_gamma=True):
    return (
        randlora_lambda.new_empty(randlora_lambda.shape if need_lambda else (0,)),
        randlora_gamma.new_empty(randlora_gamma.shape if need_gamma else (0,)),
    )


# Backward formulas, shared by the raw ops (register_autograd) and by the autograd.Functions below: torch.func needs the
# latter, as ops with registered autograd do not run under its transforms.


def _setup_unique_base(ctx, inputs, output):
    A, randlora_lambda, randlora_gamma, *options = inputs
    ctx.save_for_backward(A, randlora_lambda, randlora_gamma)
    ctx.scale = options[0] if options else 1.0


def _unique_base_gradients(ctx, grad, backward_op):
    _, need_lambda, need_gamma, *_ = ctx.needs_input_grad
    dlambda, dgamma = backward_op(grad, *ctx.saved_tensors, ctx.scale, need_lambda, need_gamma)
    return None, dlambda if need_lambda else None, dgamma if need_gamma else None, None, None


def _setup_unique_base_backward(ctx, inputs, output):
    grad, A, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma = inputs
    ctx.save_for_backward(grad, A, randlora_lambda, randlora_gamma)
    ctx.scale, ctx.need = scale, (need_lambda, need_gamma)


def _unique_base_second_gradients(ctx, v_lambda, v_gamma, forward_op, backward_op):
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


def _once_per_sample(op):
    """A vmap rule that runs `op` once per sample: right for every batching, at the memory of one sample's workspace."""

    def rule(info, in_dims, *args):
        samples = [
            op(*(a.select(d, i) if d is not None else a for a, d in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(samples[0], Tensor):
            return torch.stack(samples), 0
        return tuple(torch.stack(parts) for parts in zip(*samples, strict=True)), (0,) * len(samples[0])

    return rule


torch.library.register_autograd(
    "randlora::unique_base",
    lambda ctx, grad: _unique_base_gradients(ctx, grad, _ops.unique_base_backward),
    setup_context=_setup_unique_base,
)
torch.library.register_autograd(
    "randlora::unique_base_backward",
    lambda ctx, *v: _unique_base_second_gradients(ctx, *v, _ops.unique_base, _ops.unique_base_backward),
    setup_context=_setup_unique_base_backward,
)
torch.library.register_vmap("randlora::unique_base", _once_per_sample(_ops.unique_base))
torch.library.register_vmap("randlora::unique_base_backward", _once_per_sample(_ops.unique_base_backward))


class UniqueBaseGrad(torch.autograd.Function):
    """``S[k,i,j] = scale * lambda[k,i] * A[k,0,j] * gamma[i,j]``, gradients for lambda and gamma only (A is fixed).

    PEFT's function of the same name; :func:`randlora.functional.unique_base` is its documented face.

    ``UniqueBaseGrad.apply(randlora_A, randlora_lambda, randlora_gamma)`` takes ``[r, 1, m]``, ``[r, n]``, ``[n, m]`` in
    float64, float32, bfloat16 or float16 and returns ``[r, n, m]`` in their promoted dtype. Sums are fp32 (fp64 for
    fp64). Raises ``ValueError`` for shapes or devices and ``TypeError`` for dtypes that do not fit. Works under
    ``torch.func``, ``torch.compile`` and double backward.
    """

    @staticmethod
    def forward(randlora_A, randlora_lambda, randlora_gamma, scale=1.0, dtype=None):
        return _ops.unique_base(randlora_A, randlora_lambda, randlora_gamma, scale, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_unique_base(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_output):
        gradients = _unique_base_gradients(ctx, grad_output, _UniqueBaseBackward.apply)
        return gradients[: len(ctx.needs_input_grad)]

    @staticmethod
    def vmap(info, in_dims, *args):
        return _once_per_sample(UniqueBaseGrad.apply)(info, in_dims, *args)


class _UniqueBaseBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, A, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma):
        return _ops.unique_base_backward(grad, A, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_unique_base_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx, v_lambda, v_gamma):
        return _unique_base_second_gradients(ctx, v_lambda, v_gamma, UniqueBaseGrad.apply, _UniqueBaseBackward.apply)

    @staticmethod
    def vmap(info, in_dims, *args):
        return _once_per_sample(_UniqueBaseBackward.apply)(info, in_dims, *args)
