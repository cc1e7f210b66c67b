"""The layer op under autograd, torch.compile and torch.func: keeps its input for backward and nothing else.

``torch.ops.randlora.linear`` (csrc/linear.h) rebuilds the scaled base, the hidden activations and the update in its
backward. What autograd holds between the two is the input as it came (no cast copy), references to the weight, the
bases and the parameters, and for dropout the seed of its mask.
"""

from __future__ import annotations

import torch

from .patterns import is_bits, is_planes

_ops = torch.ops.randlora


@torch.library.register_fake("randlora::dropout")
def _(x, seed, p):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("randlora::linear")
def _(x, weight, bias, A, B, randlora_lambda, randlora_gamma, out_features, scale, dtype, *_):
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


@torch.library.register_fake("randlora::linear_backward")
def _(grad, x, weight, A, B, randlora_lambda, randlora_gamma, scale, dtype, strategy, dropout, seed, transposed,
      workspace, pattern, need_x, need_lambda, need_gamma):  # fmt: skip
    needed = ((x, need_x), (randlora_lambda, need_lambda), (randlora_gamma, need_gamma))
    return tuple(like.new_empty(like.shape if need else (0,)) for like, need in needed)


@torch.library.register_fake("randlora::sparse_update")
def _(pattern, randlora_lambda, randlora_gamma, max_dim, scale, weight, dtype):
    if weight is not None:
        return torch.empty_like(weight)
    rows = randlora_gamma.shape[1] if is_planes(pattern) else pattern[0].numel()
    return randlora_gamma.new_empty((rows, max_dim), dtype=dtype)


@torch.library.register_fake("randlora::packed_expand")
def _(pattern, n, min_dim, max_dim, dtype, first=0, rows=None):
    if rows is None:
        rows = pattern[0].shape[0] - (0 if is_bits(pattern) else 1) - first
    A = pattern[0].new_empty((rows, 1, min_dim), dtype=dtype)
    return A, A.new_empty((rows * n, max_dim))


@torch.library.register_fake("randlora::sparse_update_backward")
def _(grad, pattern, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma):
    needed = ((randlora_lambda, need_lambda), (randlora_gamma, need_gamma))
    return tuple(like.new_empty(like.shape if need else (0,)) for like, need in needed)


def _keep_sparse(ctx, inputs, output):
    pattern, lam, gamma, _, ctx.scale, weight, _ = inputs
    ctx.save_for_backward(lam, gamma, *pattern)
    ctx.with_weight = weight is not None


def _sparse_gradients(ctx, grad):
    lam, gamma, *pattern = ctx.saved_tensors
    rows = grad.index_select(0, pattern[0]) if ctx.with_weight and not is_planes(pattern) else grad
    rows = rows if rows.dtype == torch.float64 else rows.float()
    d_lam, d_gamma = _ops.sparse_update_backward(rows, pattern, lam, gamma, ctx.scale, True, True)
    return [None] * len(pattern), d_lam, d_gamma, None, None, grad if ctx.with_weight else None, None


torch.library.register_autograd("randlora::sparse_update", _sparse_gradients, setup_context=_keep_sparse)


class Linear(torch.autograd.Function):
    """``apply(x, weight, bias, A, B, lambda, gamma, out_features, scale, dtype, strategy, backward_strategy, dropout,
    seed, transposed, workspace, p0, p1, p2, p3, p4)``; arguments as in csrc/linear.h, the last five its pattern,
    filled up with None. Gradients for x, bias, lambda and gamma.

    Nothing passes between forward and backward, so their strategies need not be the same.
    """

    @staticmethod
    def forward(x, weight, bias, A, B, randlora_lambda, randlora_gamma, out_features, scale, dtype, strategy,
                backward_strategy, dropout, seed, transposed, workspace, p0, p1, p2, p3, p4):  # fmt: skip
        pattern = [t for t in (p0, p1, p2, p3, p4) if t is not None]
        return _ops.linear(
            x, weight, bias, A, B, randlora_lambda, randlora_gamma, out_features, scale, dtype, strategy, dropout,
            seed, transposed, workspace, pattern,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, A, B, randlora_lambda, randlora_gamma, _, scale, dtype, _, strategy, *options = inputs[:16]
        if ctx.needs_input_grad[1]:
            raise ValueError("the base weight is trainable: only the ordinary path can compute its gradient")
        ctx.save_for_backward(x, weight, A, B, randlora_lambda, randlora_gamma, *inputs[16:])
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.options = (scale, dtype, strategy, *options)

    @staticmethod
    def backward(ctx, grad):
        x, weight, A, B, randlora_lambda, randlora_gamma, *pattern = ctx.saved_tensors
        need_x, _, need_bias, _, _, need_lambda, need_gamma, *_ = ctx.needs_input_grad
        d_x = d_bias = d_lambda = d_gamma = None
        if need_x or need_lambda or need_gamma:
            d_x, d_lambda, d_gamma = _LinearBackward.apply(
                grad, x, weight, A, B, randlora_lambda, randlora_gamma, *ctx.options, need_x, need_lambda, need_gamma,
                *pattern,
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
            return Linear.apply(x.movedim(in_dims[0], 0), *rest), 0
        return _once_per_sample(Linear.apply, info, in_dims, x, *rest), 0


class _LinearBackward(torch.autograd.Function):
    @staticmethod
    def forward(grad, x, weight, A, B, randlora_lambda, randlora_gamma, scale, dtype, strategy, dropout, seed,
                transposed, workspace, need_x, need_lambda, need_gamma, p0, p1, p2, p3, p4):  # fmt: skip
        # Written out, as in Linear.forward: torch.compile takes *arguments for the form that begins with a ctx.
        pattern = [t for t in (p0, p1, p2, p3, p4) if t is not None]
        return _ops.linear_backward(
            grad, x, weight, A, B, randlora_lambda, randlora_gamma, scale, dtype, strategy, dropout, seed, transposed,
            workspace, pattern, need_x, need_lambda, need_gamma,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "randlora.Linear cannot be differentiated twice: it keeps nothing to do it with. For second derivatives "
            "build the update with randlora.functional.delta_weight and apply torch.nn.functional.linear."
        )

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _once_per_sample(_LinearBackward.apply, info, in_dims, *arguments), (0, 0, 0)


def _once_per_sample(function, info, in_dims, *arguments):
    results = [
        function(*(a if d is None else a.select(d, i) for a, d in zip(arguments, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(results[0], torch.Tensor):
        return torch.stack(results)
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
