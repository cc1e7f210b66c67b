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
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..private_torch import below_autograd, in_transform
from .linear_call import Fixed, Needs, Settings, call_linear, call_linear_backward
from .transforms import once_per_sample, refuse_forward_over_forward


def apply(x: Tensor, randlora_lambda: Tensor, randlora_gamma: Tensor, bias: Tensor | None, fixed: Fixed) -> Tensor:
    """The layer op: ``[..., out]``, with gradients for x, lambda, gamma and bias. Shapes: csrc/layer/arguments.h.

    Nothing passes between forward and backward, so their strategies need not be the same. Raises ``ValueError`` and
    ``TypeError`` where the arguments do not fit.
    """
    if in_transform():
        weight, A, B, seed, pattern, settings = fixed
        y: Tensor = _Linear.apply(settings, x, randlora_lambda, randlora_gamma, bias, weight, A, B, seed, *pattern)
        return y
    return call_linear(x, randlora_lambda, randlora_gamma, bias, fixed)


def _backward(
    grad: Tensor, x: Tensor, lam: Tensor, gamma: Tensor, fixed: Fixed, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, lambda and gamma, empty where they are not needed; differentiable."""
    if in_transform():
        weight, A, B, seed, pattern, settings = fixed
        found = _LinearBackward.apply(settings, needs, grad, x, lam, gamma, weight, A, B, seed, *pattern)
        d_x, d_lambda, d_gamma = found
        return d_x, d_lambda, d_gamma
    return call_linear_backward(grad, x, lam, gamma, fixed, needs)


# ---- the derivative of linear_backward ---------------------------------------------------------------------------


def _keep_call(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: tuple[Tensor, ...]
) -> None:
    """Of linear_backward, for :func:`_gradients_of_call`."""
    grad, x, weight, A, B, lam, gamma, pattern, seed = inputs
    options = dict(keyword_only_inputs)
    ctx.needs = Needs(*(options.pop(name) for name in ("need_x", "need_lambda", "need_gamma")))
    ctx.settings = Settings(out_features=grad.shape[-1], backward_strategy=options["strategy"], **options)
    ctx.save_for_backward(grad, x, lam, gamma, weight, A, B, seed, *pattern)
    ctx.set_materialize_grads(False)


def _gradients_of_call(
    ctx: Any, v_x: Tensor | None, v_lambda: Tensor | None, v_gamma: Tensor | None
) -> tuple[Tensor | list[None] | None, ...]:
    need_grad, need_x, need_weight, _, _, need_lambda, need_gamma, *_ = ctx.needs_input_grad
    needs = Needs(need_x, need_lambda, need_gamma)
    d_grad, d_x, d_lambda, d_gamma = _second_gradients(ctx, (v_x, v_lambda, v_gamma), need_grad, needs, need_weight)
    *_, fixed = _kept_with_grad(ctx)
    return d_grad, d_x, None, None, None, d_lambda, d_gamma, [None for _ in fixed.pattern], None


torch.library.register_autograd("randlora::linear_backward", _gradients_of_call, setup_context=_keep_call)


# ---- the same as functions, for torch.func and forward mode -----------------------------------------------------


class _Linear(torch.autograd.Function):
    """:func:`apply`, with settings first and the tensors of the pattern last."""

    @staticmethod
    def forward(
        settings: Settings,
        x: Tensor,
        lam: Tensor,
        gamma: Tensor,
        bias: Tensor | None,
        weight: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        seed: Tensor | None,
        *pattern: Tensor,
    ) -> Tensor:
        with below_autograd():  # the op's own autograd would cost time and has nothing to add
            return call_linear(x, lam, gamma, bias, Fixed(weight, A, B, seed, pattern, settings))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.settings, x, lam, gamma, bias, *fixed = inputs
        _refuse_trainable(ctx.needs_input_grad[5])
        ctx.save_for_backward(x, lam, gamma, *fixed)
        ctx.save_for_forward(x, lam, gamma, *fixed)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, need_x, need_lambda, need_gamma, need_bias, *of_fixed = ctx.needs_input_grad
        needs = Needs(need_x, need_lambda, need_gamma)
        d_x = d_lambda = d_gamma = d_bias = None
        if any(needs):
            x, lam, gamma, fixed = _kept(ctx)
            d_x, d_lambda, d_gamma = _wanted(_backward(grad, x, lam, gamma, fixed, needs), needs)
        if need_bias:
            d_bias = grad.flatten(0, -2).sum(0, dtype=ctx.bias_dtype) if grad.dim() > 1 else grad.to(ctx.bias_dtype)
        return None, d_x, d_lambda, d_gamma, d_bias, *(None for _ in of_fixed)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], settings: Settings, x: Tensor, *others: Any) -> Any:
        _, x_dim, *other_dims = in_dims
        if x_dim is not None and all(d is None for d in other_dims):
            # A batch of inputs alone is one more leading axis.
            return _Linear.apply(settings, x.movedim(x_dim, 0), *others), 0
        return once_per_sample(functools.partial(_Linear.apply, settings))(info, in_dims[1:], x, *others)

    @staticmethod
    def jvp(
        ctx: Any,
        _: None,
        x_t: Tensor | None,
        lambda_t: Tensor | None,
        gamma_t: Tensor | None,
        bias_t: Tensor | None,
        weight_t: Tensor | None,
        *of_fixed: Tensor | None,
    ) -> Tensor | None:
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
    def forward(
        settings: Settings,
        needs: Needs,
        grad: Tensor,
        x: Tensor,
        lam: Tensor,
        gamma: Tensor,
        weight: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        seed: Tensor | None,
        *pattern: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return call_linear_backward(grad, x, lam, gamma, Fixed(weight, A, B, seed, pattern, settings), needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.settings, ctx.needs, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, v_x: Tensor | None, v_lambda: Tensor | None, v_gamma: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        _, _, need_grad, need_x, need_lambda, need_gamma, need_weight, *others = ctx.needs_input_grad
        needs = Needs(need_x, need_lambda, need_gamma)
        found = _second_gradients(ctx, (v_x, v_lambda, v_gamma), need_grad, needs, need_weight)
        return None, None, *found, None, *(None for _ in others)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], settings: Settings, needs: Needs, *tensors: Any) -> Any:
        return once_per_sample(functools.partial(_LinearBackward.apply, settings, needs))(info, in_dims[2:], *tensors)

    @staticmethod
    def jvp(
        ctx: Any,
        _settings: None,
        _needs: None,
        grad_t: Any,  # of what is a tensor: a tensor or None
        x_t: Any,
        lambda_t: Any,
        gamma_t: Any,
        weight_t: Any,
        *of_fixed: Any,
    ) -> tuple[Tensor | None, ...]:
        refuse_forward_over_forward()
        grad, x, lam, gamma, fixed = _kept_with_grad(ctx)
        settings, alone, needs = fixed.settings, fixed.without_weight(), ctx.needs
        found: tuple[list[Tensor], ...] = [], [], []
        for tangent, places, of, moved in (
            (grad_t, (grad_t, x, lam, gamma), fixed, needs),
            (x_t, (grad, x_t, lam, gamma), alone, needs._replace(x=False)),
            (lambda_t, (grad, x, lambda_t, gamma), alone, needs._replace(randlora_lambda=False)),
            (gamma_t, (grad, x, lam, gamma_t), alone, needs._replace(randlora_gamma=False)),
        ):
            if tangent is not None and any(moved):
                in_grad, in_x, in_lambda, in_gamma = places
                parts = _backward(in_grad, in_x, in_lambda, in_gamma, of, moved)
                _collect(found, _wanted(parts, moved))
        if needs.x and weight_t is not None:
            rows = (weight_t if settings.weight_is_transposed else weight_t.t()).to(settings.dtype)
            found[0].append(F.linear(grad.to(settings.dtype), rows).to(x.dtype))
        return tuple(
            _sum(parts, functools.partial(like.new_zeros, like.shape if need else (0,)))
            for parts, like, need in zip(found, (x, lam, gamma), needs, strict=True)
        )


# ---- what both have in common -----------------------------------------------------------------------------------


def _second_gradients(
    ctx: Any, directions: Sequence[Any], need_grad: bool, needs: Needs, need_weight: bool
) -> tuple[Tensor | None, ...]:
    """Of <v_x, dx> + <v_lambda, dlambda> + <v_gamma, dgamma>, where the three are derivatives of F, by grad, x, lambda
    and gamma.
    """
    _refuse_trainable(need_weight)
    grad, x, lam, gamma, fixed = _kept_with_grad(ctx)
    v_x, v_lambda, v_gamma = directions
    alone = fixed.without_weight()
    of_grad: list[Tensor] = []
    found: tuple[list[Tensor], ...] = [], [], []
    for v, places, of, wanted in (
        (v_x, (v_x, lam, gamma), fixed, needs._replace(x=False)),
        (v_lambda, (x, v_lambda, gamma), alone, needs._replace(randlora_lambda=False)),
        (v_gamma, (x, lam, v_gamma), alone, needs._replace(randlora_gamma=False)),
    ):
        if v is None:
            continue
        in_x, in_lambda, in_gamma = places
        if need_grad:
            of_grad.append(apply(in_x, in_lambda, in_gamma, None, of))
        if any(wanted):
            _collect(found, _wanted(_backward(grad, in_x, in_lambda, in_gamma, of, wanted), wanted))
    d_grad = _sum(of_grad)
    return None if d_grad is None else d_grad.to(grad.dtype), *map(_sum, found)


def _kept(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Fixed]:
    """What the op's function has saved: x, lambda, gamma and what is fixed."""
    x, lam, gamma, weight, A, B, seed, *pattern = ctx.saved_tensors
    return x, lam, gamma, Fixed(weight, A, B, seed, pattern, ctx.settings)


def _kept_with_grad(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Fixed]:
    """What its backward's has saved: grad, x, lambda, gamma and what is fixed."""
    grad, x, lam, gamma, weight, A, B, seed, *pattern = ctx.saved_tensors
    return grad, x, lam, gamma, Fixed(weight, A, B, seed, pattern, ctx.settings)


def _wanted(gradients: Sequence[Tensor], needs: Needs) -> list[Tensor | None]:
    return [t if need else None for t, need in zip(gradients, needs, strict=True)]


def _collect(found: Sequence[list[Tensor]], parts: Sequence[Tensor | None]) -> None:
    for into, part in zip(found, parts, strict=True):
        if part is not None:
            into.append(part)


def _sum(parts: list[Tensor], otherwise: Callable[[], Tensor | None] = lambda: None) -> Tensor | None:
    return sum(parts[1:], parts[0]) if parts else otherwise()


def _refuse_trainable(need_weight: bool) -> None:
    if need_weight:
        raise ValueError("the base weight is trainable: only the ordinary path can compute its gradient")
