"""The scaled base and the update of packed bases under autograd, forward-mode AD and ``torch.func``.

``torch.ops.randlora.*`` is registered by the compiled module (schemas in ``csrc/ops.cpp``). Nothing is saved for
backward but the inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .pattern import ListTensors, is_lists, is_signs

_ops = torch.ops.randlora


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


def once_per_sample(op):
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


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work: they know functions, and of an op's own autograd little.

    torch.compile, which knows ops, leaves functions with a rule for forward mode to eager execution.
    """
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def refuse_forward_over_forward() -> None:
    """PyTorch leaves the outer derivative out where a custom function is differentiated forward twice."""
    jvp = torch._C._functorch.TransformType.Jvp
    if sum(level.key() == jvp for level in torch._C._functorch.get_interpreter_stack() or ()) > 1:
        raise RuntimeError(
            "randlora's ops cannot be differentiated forward twice (jvp of jvp, jacfwd of jacfwd): take "
            "torch.func.hessian, jacfwd of jacrev, or jacrev of either"
        )


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
torch.library.register_vmap("randlora::unique_base", once_per_sample(_ops.unique_base))
torch.library.register_vmap("randlora::unique_base_backward", once_per_sample(_ops.unique_base_backward))


class _UniqueBase(torch.autograd.Function):
    @staticmethod
    def forward(randlora_A, randlora_lambda, randlora_gamma, scale=1.0, dtype=None):
        if torch.compiler.is_compiling() and in_transform():
            torch._dynamo.graph_break()  # torch.compile would take this for all of the function, and drop tangents
        return _ops.unique_base(randlora_A, randlora_lambda, randlora_gamma, scale, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_unique_base(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_output):
        gradients = _unique_base_gradients(ctx, grad_output, _unique_base_backward)
        return gradients[: len(ctx.needs_input_grad)]

    @staticmethod
    def vmap(info, in_dims, *args):
        return once_per_sample(UniqueBaseGrad.apply)(info, in_dims, *args)


class _ForwardModeUniqueBase(_UniqueBase):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_unique_base(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])
        ctx.dtype = output.dtype

    @staticmethod
    def jvp(ctx, A_t, lambda_t, gamma_t, *_):
        refuse_forward_over_forward()
        A, lam, gamma = ctx.saved_tensors
        parts = [
            UniqueBaseGrad.apply(A, *factors, ctx.scale, ctx.dtype)
            for tangent, factors in ((lambda_t, (lambda_t, gamma)), (gamma_t, (lam, gamma_t)))
            if tangent is not None
        ]
        return sum(parts) if parts else A.new_zeros((*lam.shape, A.shape[2]), dtype=ctx.dtype)


class UniqueBaseGrad(_UniqueBase):
    """``S[k,i,j] = scale * lambda[k,i] * A[k,0,j] * gamma[i,j]``, derivatives by lambda and gamma only (A is fixed).

    PEFT's function of the same name; :func:`randlora.functional.unique_base` is its documented face.

    ``UniqueBaseGrad.apply(randlora_A, randlora_lambda, randlora_gamma)`` takes ``[r, 1, m]``, ``[r, n]``, ``[n, m]`` in
    float64, float32, bfloat16 or float16 and returns ``[r, n, m]`` in their promoted dtype. Sums are fp32 (fp64 for
    fp64). Raises ``ValueError`` for shapes or devices and ``TypeError`` for dtypes that do not fit. Works under
    ``torch.func``, ``torch.compile``, double backward and forward-mode AD.
    """

    @classmethod
    def apply(cls, *args):
        # torch.compile refuses functions that have a rule for forward-mode AD.
        return (_UniqueBase if torch.compiler.is_compiling() else _ForwardModeUniqueBase).apply(*args)


def _unique_base_backward(*args):
    return (_UniqueBaseBackward if torch.compiler.is_compiling() else _ForwardModeUniqueBaseBackward).apply(*args)


class _UniqueBaseBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, A, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma):
        return _ops.unique_base_backward(grad, A, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_unique_base_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx, v_lambda, v_gamma):
        return _unique_base_second_gradients(ctx, v_lambda, v_gamma, UniqueBaseGrad.apply, _unique_base_backward)

    @staticmethod
    def vmap(info, in_dims, *args):
        return once_per_sample(_unique_base_backward)(info, in_dims, *args)


class _ForwardModeUniqueBaseBackward(_UniqueBaseBackward):
    @staticmethod
    def setup_context(ctx, inputs, output):
        _setup_unique_base_backward(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:4])

    @staticmethod
    def jvp(ctx, grad_t, A_t, lambda_t, gamma_t, *_):
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


# ---- the update of packed bases --------------------------------------------------------------------------------


def _keep_sparse(ctx, inputs, output):
    pattern, lam, gamma, _, ctx.scale, weight, _ = inputs
    ctx.save_for_backward(lam, gamma, *pattern)
    ctx.with_weight = weight is not None


def _sparse_gradients(ctx, grad):
    lam, gamma, *pattern = ctx.saved_tensors
    rows = grad
    if ctx.with_weight and is_lists(pattern):
        rows = grad.index_select(0, ListTensors(*pattern).columns)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    backward = _ops.hadamard_update_backward if is_signs(pattern) else _ops.sparse_update_backward
    d_lam, d_gamma = backward(rows, pattern, lam, gamma, ctx.scale, True, True)
    return [None] * len(pattern), d_lam, d_gamma, None, None, grad if ctx.with_weight else None, None


torch.library.register_autograd("randlora::sparse_update", _sparse_gradients, setup_context=_keep_sparse)
torch.library.register_autograd("randlora::hadamard_update", _sparse_gradients, setup_context=_keep_sparse)
