"""The layer op under autograd, torch.compile and torch.func: keeps its input for backward and nothing else.

``torch.ops.randlora.linear`` (csrc/linear.h) rebuilds the scaled base, the hidden activations and the update in its
backward. What autograd holds between the two is the input as it came (no cast copy), references to the weight, the
bases and the parameters, and for dropout the seed of its mask. The op has its node of autograd in C++
(csrc/linear_autograd.cpp); here is what that does not know: derivatives of its backward, torch.func and forward mode.

With a gradient g of y, everything follows from one form that is linear in each of its four arguments,
``F(g, x, lambda, gamma) = <g, dropout(x) dW(lambda, gamma)^T>``: the update is its derivative by g, and the gradients
of x, lambda and gamma are the three others. So a derivative in a direction, or of a gradient, is the same two ops again
with one argument in the place of another, and the functions below can be differentiated any number of times.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .unique_base import in_transform, once_per_sample, refuse_forward_over_forward

_ops = torch.ops.randlora
_linear, _linear_backward = _ops.linear.default, _ops.linear_backward.default

# The update without the base weight, with every form of bases on every device.
_ALONE = "materialized"


def apply(*arguments) -> Tensor:
    """The layer op: ``apply(x, weight, bias, A, B, lambda, gamma, out_features, scale, dtype, strategy, dropout, seed,
    transposed, workspace, pattern, backward_strategy)``, the arguments of csrc/linear.h.

    Gradients for x, bias, lambda and gamma. Nothing passes between forward and backward, so their strategies need not
    be the same.
    """
    if in_transform():
        *others, pattern, backward_strategy = arguments
        return _Linear.apply(*others, backward_strategy, *pattern, *[None] * (5 - len(pattern)))
    return _linear(*arguments)


def _backward(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, lambda and gamma, empty where they are not needed; differentiable. Arguments of the op."""
    if in_transform():
        *others, pattern, need_x, need_lambda, need_gamma = arguments
        rest = *pattern, *[None] * (5 - len(pattern))
        return _LinearBackward.apply(*others, need_x, need_lambda, need_gamma, *rest)
    return _linear_backward(*arguments)


class _Linear(torch.autograd.Function):
    """:func:`apply` with the backward's strategy before the pattern, which comes as five tensors or None."""

    @staticmethod
    def forward(*arguments):
        *others, _ = arguments[:16]
        with torch._C._AutoDispatchBelowAutograd():  # the op's own autograd would cost time and has nothing to add
            return _linear(*others, [t for t in arguments[16:] if t is not None])

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, A, B, lam, gamma, ctx.out_features, ctx.scale, ctx.dtype, ctx.strategy, *options = inputs[:16]
        if ctx.needs_input_grad[1]:
            raise ValueError("the base weight is trainable: only the ordinary path can compute its gradient")
        tensors = x, weight, A, B, lam, gamma, *inputs[16:]
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.bias_dtype = None if bias is None else bias.dtype
        *ctx.options, ctx.backward_strategy = options

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B, randlora_lambda, randlora_gamma, *pattern = ctx.saved_tensors
        need_x, _, need_bias, _, _, need_lambda, need_gamma, *_ = ctx.needs_input_grad
        d_x = d_bias = d_lambda = d_gamma = None
        if need_x or need_lambda or need_gamma:
            d_x, d_lambda, d_gamma = _backward(
                grad, x, weight, A, B, randlora_lambda, randlora_gamma, ctx.scale, ctx.dtype, ctx.backward_strategy,
                *ctx.options, _given(pattern), need_x, need_lambda, need_gamma,
            )  # fmt: skip
        if need_bias:
            d_bias = grad.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
        return (
            d_x if need_x else None, None, d_bias, None, None,
            d_lambda if need_lambda else None, d_gamma if need_gamma else None, *[None] * 14,
        )  # fmt: skip

    @staticmethod
    def vmap(info, in_dims, x, *rest):
        if in_dims[0] is not None and all(d is None for d in in_dims[1:]):
            # A batch of inputs alone is one more leading axis.
            return _Linear.apply(x.movedim(in_dims[0], 0), *rest), 0
        return once_per_sample(_Linear.apply)(info, in_dims, x, *rest)

    @staticmethod
    def jvp(ctx, x_t, weight_t, bias_t, A_t, B_t, lambda_t, gamma_t, *_):
        refuse_forward_over_forward()
        x, weight, A, B, lam, gamma, *pattern = ctx.saved_tensors
        transposed = ctx.options[2]

        def forward(x, weight, lam, gamma):
            ways = (_ALONE, _ALONE) if weight is None else (ctx.strategy, ctx.backward_strategy)
            return apply(
                x, weight, None, A, B, lam, gamma, ctx.out_features, ctx.scale, ctx.dtype, ways[0], *ctx.options,
                _given(pattern), ways[1],
            )  # fmt: skip

        parts = []
        if x_t is not None:
            parts.append(forward(x_t, weight, lam, gamma))
        if lambda_t is not None:
            parts.append(forward(x, None, lambda_t, gamma))
        if gamma_t is not None:
            parts.append(forward(x, None, lam, gamma_t))
        if weight_t is not None:
            parts.append(F.linear(x.to(ctx.dtype), (weight_t.t() if transposed else weight_t).to(ctx.dtype)))
        if bias_t is not None:
            parts.append(bias_t.to(ctx.dtype).expand(*x.shape[:-1], ctx.out_features))
        return _sum(parts, lambda: x.new_zeros((*x.shape[:-1], ctx.out_features), dtype=ctx.dtype))


class _LinearBackward(torch.autograd.Function):
    """:func:`_backward` with its pattern at the end, as five tensors or None."""

    @staticmethod
    def forward(*arguments):
        return _linear_backward(*arguments[:14], _given(arguments[17:]), *arguments[14:17])

    @staticmethod
    def setup_context(ctx, inputs, output):
        _keep_backward(ctx, (*inputs[:14], inputs[17:], *inputs[14:17]), output)
        ctx.save_for_forward(*inputs[:7], *inputs[17:])

    @staticmethod
    def backward(ctx, v_x, v_lambda, v_gamma):
        return *_second_gradients(ctx, v_x, v_lambda, v_gamma), *[None] * 15

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return once_per_sample(_LinearBackward.apply)(info, in_dims, *arguments)

    @staticmethod
    def jvp(ctx, grad_t, x_t, weight_t, A_t, B_t, lambda_t, gamma_t, *_):
        refuse_forward_over_forward()
        grad, x, weight, A, B, lam, gamma, *pattern = ctx.saved_tensors
        scale, dtype, strategy, *options = ctx.options
        transposed = options[2]
        need_x, need_lambda, need_gamma = ctx.needed
        found = [], [], []
        for tangent, places, needs in (
            (grad_t, (grad_t, x, weight, lam, gamma), ctx.needed),
            (x_t, (grad, x_t, None, lam, gamma), (False, need_lambda, need_gamma)),
            (lambda_t, (grad, x, None, lambda_t, gamma), (need_x, False, need_gamma)),
            (gamma_t, (grad, x, None, lam, gamma_t), (need_x, need_lambda, False)),
        ):
            if tangent is None or not any(needs):
                continue
            in_grad, in_x, in_weight, in_lambda, in_gamma = places
            parts = _backward(
                in_grad, in_x, in_weight, A, B, in_lambda, in_gamma, scale, dtype,
                _ALONE if in_weight is None else strategy, *options, _given(pattern), *needs,
            )  # fmt: skip
            for into, part, need in zip(found, parts, needs, strict=True):
                if need:
                    into.append(part)
        if need_x and weight_t is not None:
            rows = (weight_t if transposed else weight_t.t()).to(dtype)
            found[0].append(F.linear(grad.to(dtype), rows).to(x.dtype))
        return tuple(
            _sum(parts, functools.partial(like.new_zeros, like.shape if need else (0,)))
            for parts, like, need in zip(found, (x, lam, gamma), ctx.needed, strict=True)
        )


# ---- derivatives of the backward: of the op itself, and of the function above -----------------------------------


def _keep_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], *inputs[14])
    ctx.options, ctx.needed = inputs[7:14], inputs[15:]
    ctx.set_materialize_grads(False)


def _second_gradients(ctx, v_x, v_lambda, v_gamma):
    """Of <v_x, dx> + <v_lambda, dlambda> + <v_gamma, dgamma>, where the three are derivatives of F, by the tensors."""
    grad, x, weight, A, B, lam, gamma, *pattern = ctx.saved_tensors
    pattern = _given(pattern)
    scale, dtype, strategy, *options = ctx.options
    need_grad, need_x, need_weight, _, _, need_lambda, need_gamma, *_ = ctx.needs_input_grad
    if need_weight:
        raise ValueError("the base weight is trainable: only the ordinary path can compute its gradient")
    d_grad, d_x, d_lambda, d_gamma = [], [], [], []
    for v, places, needs in (
        (v_x, (v_x, weight, lam, gamma), (False, need_lambda, need_gamma)),
        (v_lambda, (x, None, v_lambda, gamma), (need_x, False, need_gamma)),
        (v_gamma, (x, None, lam, v_gamma), (need_x, need_lambda, False)),
    ):
        if v is None:
            continue
        in_x, in_weight, in_lambda, in_gamma = places
        way = _ALONE if in_weight is None else strategy
        if need_grad:
            d_grad.append(apply(
                in_x, in_weight, None, A, B, in_lambda, in_gamma, grad.shape[-1], scale, dtype, way, *options, pattern,
                way,
            ))  # fmt: skip
        if any(needs):
            found = _backward(
                grad, in_x, in_weight, A, B, in_lambda, in_gamma, scale, dtype, way, *options, pattern, *needs
            )
            for parts, part, need in zip((d_x, d_lambda, d_gamma), found, needs, strict=True):
                if need:
                    parts.append(part)
    d_grad, d_x, d_lambda, d_gamma = map(_sum, (d_grad, d_x, d_lambda, d_gamma))
    return None if d_grad is None else d_grad.to(grad.dtype), d_x, None, None, None, d_lambda, d_gamma


def _op_gradients(ctx, *v):
    return *_second_gradients(ctx, *v), *[None] * 7, [None] * (len(ctx.saved_tensors) - 7), None, None, None


torch.library.register_autograd("randlora::linear_backward", _op_gradients, setup_context=_keep_backward)


def _given(pattern) -> list[Tensor]:
    return [t for t in pattern if t is not None]


def _sum(parts: list[Tensor], otherwise=lambda: None) -> Tensor | None:
    return sum(parts[1:], parts[0]) if parts else otherwise()
