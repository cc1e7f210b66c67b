"""The layer op under autograd, torch.compile and torch.func: keeps its input for backward and nothing else.

``torch.ops.randlora.linear`` (csrc/layer) rebuilds the scaled base, the hidden activations and the update in its
backward. What autograd holds between the two is the input as it came (no cast copy), references to the weight, the
bases and the parameters, and for dropout the seed of its mask. The op has its node of autograd in C++
(csrc/layer/autograd.cpp); here is what that does not know: derivatives of its backward, torch.func and forward mode.

With a gradient g of y, everything follows from one form that is linear in each of its four arguments,
``F(g, x, lambda, gamma) = <g, dropout(x) dW(lambda, gamma)^T>``: the update is its derivative by g, and the gradients
of x, lambda and gamma are the three others. So a derivative in a direction, or of a gradient, is the same two ops again
with one argument in the place of another, and the functions below can be differentiated any number of times.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .unique_base import in_transform, once_per_sample, refuse_forward_over_forward

_ops = torch.ops.randlora
_linear, _linear_backward = _ops.linear.default, _ops.linear_backward.default

# The update without the base weight, with every form of bases on every device.
_ALONE = "materialized"


class Settings(NamedTuple):
    """What is not a tensor among the arguments of the op (csrc/layer/arguments.h)."""

    out_features: int
    scale: float
    dtype: torch.dtype  # of the result
    strategy: str
    backward_strategy: str
    dropout: float
    weight_is_transposed: bool
    workspace: int


class Needs(NamedTuple):
    """Which gradients are asked for."""

    x: bool
    randlora_lambda: bool
    randlora_gamma: bool


class Fixed(NamedTuple):
    """What takes part in a call and gets no gradient."""

    weight: Tensor | None
    A: Tensor | None
    B: Tensor | None
    seed: Tensor | None
    pattern: Sequence[Tensor]
    settings: Settings

    def without_weight(self) -> Fixed:
        settings = self.settings._replace(strategy=_ALONE, backward_strategy=_ALONE)
        return self._replace(weight=None, settings=settings)


def apply(x: Tensor, randlora_lambda: Tensor, randlora_gamma: Tensor, bias: Tensor | None, fixed: Fixed) -> Tensor:
    """The layer op: ``[..., out]``, with gradients for x, lambda, gamma and bias. Shapes: csrc/layer/arguments.h.

    Nothing passes between forward and backward, so their strategies need not be the same. Raises ``ValueError`` and
    ``TypeError`` where the arguments do not fit.
    """
    if in_transform():
        weight, A, B, seed, pattern, settings = fixed
        return _Linear.apply(settings, x, randlora_lambda, randlora_gamma, bias, weight, A, B, seed, *pattern)
    return _call_linear(x, randlora_lambda, randlora_gamma, bias, fixed)


def _backward(
    grad: Tensor, x: Tensor, lam: Tensor, gamma: Tensor, fixed: Fixed, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, lambda and gamma, empty where they are not needed; differentiable."""
    if in_transform():
        weight, A, B, seed, pattern, settings = fixed
        return _LinearBackward.apply(settings, needs, grad, x, lam, gamma, weight, A, B, seed, *pattern)
    return _call_linear_backward(grad, x, lam, gamma, fixed, needs)


# ---- the ops by their schemas -----------------------------------------------------------------------------------


def _call_linear(x: Tensor, lam: Tensor, gamma: Tensor, bias: Tensor | None, fixed: Fixed) -> Tensor:
    weight, A, B, seed, pattern, settings = fixed
    return _linear(
        x, weight, bias, A, B, lam, gamma, pattern, seed,
        out_features=settings.out_features, scale=settings.scale, dtype=settings.dtype, strategy=settings.strategy,
        dropout=settings.dropout, weight_is_transposed=settings.weight_is_transposed, workspace=settings.workspace,
        backward_strategy=settings.backward_strategy,
    )  # fmt: skip


def _call_linear_backward(
    grad: Tensor, x: Tensor, lam: Tensor, gamma: Tensor, fixed: Fixed, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    weight, A, B, seed, pattern, settings = fixed
    return _linear_backward(
        grad, x, weight, A, B, lam, gamma, pattern, seed,
        scale=settings.scale, dtype=settings.dtype, strategy=settings.backward_strategy, dropout=settings.dropout,
        weight_is_transposed=settings.weight_is_transposed, workspace=settings.workspace,
        need_x=needs.x, need_lambda=needs.randlora_lambda, need_gamma=needs.randlora_gamma,
    )  # fmt: skip


def _keep_call(ctx, inputs, keyword_only_inputs, output):
    """Of linear_backward, for :func:`_gradients_of_call`."""
    grad, x, weight, A, B, lam, gamma, pattern, seed = inputs
    options = dict(keyword_only_inputs)
    ctx.needs = Needs(*(options.pop(name) for name in ("need_x", "need_lambda", "need_gamma")))
    ctx.settings = Settings(out_features=grad.shape[-1], backward_strategy=options["strategy"], **options)
    ctx.save_for_backward(grad, x, lam, gamma, weight, A, B, seed, *pattern)
    ctx.set_materialize_grads(False)


def _gradients_of_call(ctx, v_x, v_lambda, v_gamma):
    need_grad, need_x, need_weight, _, _, need_lambda, need_gamma, *_ = ctx.needs_input_grad
    needs = Needs(need_x, need_lambda, need_gamma)
    d_grad, d_x, d_lambda, d_gamma = _second_gradients(ctx, (v_x, v_lambda, v_gamma), need_grad, needs, need_weight)
    *_, fixed = _kept(ctx, 4)
    return d_grad, d_x, None, None, None, d_lambda, d_gamma, [None for _ in fixed.pattern], None


torch.library.register_autograd("randlora::linear_backward", _gradients_of_call, setup_context=_keep_call)


# ---- the same as functions, for torch.func and forward mode -----------------------------------------------------


class _Linear(torch.autograd.Function):
    """:func:`apply`, with settings first and the tensors of the pattern last."""

    @staticmethod
    def forward(settings, x, lam, gamma, bias, weight, A, B, seed, *pattern):
        with torch._C._AutoDispatchBelowAutograd():  # the op's own autograd would cost time and has nothing to add
            return _call_linear(x, lam, gamma, bias, Fixed(weight, A, B, seed, pattern, settings))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings, x, lam, gamma, bias, *fixed = inputs
        _refuse_trainable(ctx.needs_input_grad[5])
        ctx.save_for_backward(x, lam, gamma, *fixed)
        ctx.save_for_forward(x, lam, gamma, *fixed)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        _, need_x, need_lambda, need_gamma, need_bias, *of_fixed = ctx.needs_input_grad
        needs = Needs(need_x, need_lambda, need_gamma)
        d_x = d_lambda = d_gamma = d_bias = None
        if any(needs):
            d_x, d_lambda, d_gamma = _wanted(_backward(grad, *_kept(ctx), needs), needs)
        if need_bias:
            d_bias = grad.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
        return None, d_x, d_lambda, d_gamma, d_bias, *(None for _ in of_fixed)

    @staticmethod
    def vmap(info, in_dims, settings, x, *others):
        _, x_dim, *other_dims = in_dims
        if x_dim is not None and all(d is None for d in other_dims):
            # A batch of inputs alone is one more leading axis.
            return _Linear.apply(settings, x.movedim(x_dim, 0), *others), 0
        return once_per_sample(functools.partial(_Linear.apply, settings))(info, in_dims[1:], x, *others)

    @staticmethod
    def jvp(ctx, _, x_t, lambda_t, gamma_t, bias_t, weight_t, *of_fixed):
        refuse_forward_over_forward()
        x, lam, gamma, fixed = _kept(ctx)
        settings, alone = fixed.settings, fixed.without_weight()
        dtype, shape = settings.dtype, (*x.shape[:-1], settings.out_features)
        parts = []
        if x_t is not None:
            parts.append(apply(x_t, lam, gamma, None, fixed))
        if lambda_t is not None:
            parts.append(apply(x, lambda_t, gamma, None, alone))
        if gamma_t is not None:
            parts.append(apply(x, lam, gamma_t, None, alone))
        if weight_t is not None:
            parts.append(F.linear(x.to(dtype), (weight_t.t() if settings.weight_is_transposed else weight_t).to(dtype)))
        if bias_t is not None:
            parts.append(bias_t.to(dtype).expand(shape))
        return _sum(parts, lambda: x.new_zeros(shape, dtype=dtype))


class _LinearBackward(torch.autograd.Function):
    """:func:`_backward`, with settings and needs first and the tensors of the pattern last."""

    @staticmethod
    def forward(settings, needs, grad, x, lam, gamma, weight, A, B, seed, *pattern):
        return _call_linear_backward(grad, x, lam, gamma, Fixed(weight, A, B, seed, pattern, settings), needs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.settings, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, v_x, v_lambda, v_gamma):
        _, _, need_grad, need_x, need_lambda, need_gamma, need_weight, *others = ctx.needs_input_grad
        needs = Needs(need_x, need_lambda, need_gamma)
        found = _second_gradients(ctx, (v_x, v_lambda, v_gamma), need_grad, needs, need_weight)
        return None, None, *found, None, *(None for _ in others)

    @staticmethod
    def vmap(info, in_dims, settings, needs, *tensors):
        return once_per_sample(functools.partial(_LinearBackward.apply, settings, needs))(info, in_dims[2:], *tensors)

    @staticmethod
    def jvp(ctx, _settings, _needs, grad_t, x_t, lambda_t, gamma_t, weight_t, *of_fixed):
        refuse_forward_over_forward()
        grad, x, lam, gamma, fixed = _kept(ctx, 4)
        settings, alone, needs = fixed.settings, fixed.without_weight(), ctx.needs
        found = [], [], []
        for tangent, places, of, moved in (
            (grad_t, (grad_t, x, lam, gamma), fixed, needs),
            (x_t, (grad, x_t, lam, gamma), alone, needs._replace(x=False)),
            (lambda_t, (grad, x, lambda_t, gamma), alone, needs._replace(randlora_lambda=False)),
            (gamma_t, (grad, x, lam, gamma_t), alone, needs._replace(randlora_gamma=False)),
        ):
            if tangent is not None and any(moved):
                _collect(found, _wanted(_backward(*places, of, moved), moved))
        if needs.x and weight_t is not None:
            rows = (weight_t if settings.weight_is_transposed else weight_t.t()).to(settings.dtype)
            found[0].append(F.linear(grad.to(settings.dtype), rows).to(x.dtype))
        return tuple(
            _sum(parts, functools.partial(like.new_zeros, like.shape if need else (0,)))
            for parts, like, need in zip(found, (x, lam, gamma), needs, strict=True)
        )


# ---- what both have in common -----------------------------------------------------------------------------------


def _second_gradients(ctx, directions, need_grad: bool, needs: Needs, need_weight: bool):
    """Of <v_x, dx> + <v_lambda, dlambda> + <v_gamma, dgamma>, where the three are derivatives of F, by grad, x, lambda
    and gamma.
    """
    _refuse_trainable(need_weight)
    grad, x, lam, gamma, fixed = _kept(ctx, 4)
    v_x, v_lambda, v_gamma = directions
    alone = fixed.without_weight()
    of_grad, found = [], ([], [], [])
    for v, places, of, wanted in (
        (v_x, (v_x, lam, gamma), fixed, needs._replace(x=False)),
        (v_lambda, (x, v_lambda, gamma), alone, needs._replace(randlora_lambda=False)),
        (v_gamma, (x, lam, v_gamma), alone, needs._replace(randlora_gamma=False)),
    ):
        if v is None:
            continue
        if need_grad:
            of_grad.append(apply(*places, None, of))
        if any(wanted):
            _collect(found, _wanted(_backward(grad, *places, of, wanted), wanted))
    d_grad = _sum(of_grad)
    return None if d_grad is None else d_grad.to(grad.dtype), *map(_sum, found)


def _kept(ctx, others: int = 3) -> tuple:
    """What a function has saved: x, lambda and gamma, with grad before them where `others` is 4, and what is fixed."""
    weight, A, B, seed, *pattern = ctx.saved_tensors[others:]
    return *ctx.saved_tensors[:others], Fixed(weight, A, B, seed, pattern, ctx.settings)


def _wanted(gradients: Sequence[Tensor], needs: Needs) -> list[Tensor | None]:
    return [t if need else None for t, need in zip(gradients, needs, strict=True)]


def _collect(found: Sequence[list[Tensor]], parts: Sequence[Tensor | None]) -> None:
    for into, part in zip(found, parts, strict=True):
        if part is not None:
            into.append(part)


def _sum(parts: list[Tensor], otherwise=lambda: None) -> Tensor | None:
    return sum(parts[1:], parts[0]) if parts else otherwise()


def _refuse_trainable(need_weight: bool) -> None:
    if need_weight:
        raise ValueError("the base weight is trainable: only the ordinary path can compute its gradient")
