"""Gradients of the update of packed, listed and Hadamard bases, ``sparse_update`` and ``hadamard_update``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dtypes import at_least_fp32
from . import calls
from .pattern import ListTensors, is_lists, is_signs
from .transforms import refuse_tangent


def _keep_sparse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pattern, lam, gamma, _, ctx.scale, weight, _ = inputs
    ctx.save_for_backward(lam, gamma, *pattern)
    ctx.with_weight = weight is not None


def _sparse_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | list[None] | None, ...]:
    refuse_tangent(grad)
    lam, gamma, *pattern = ctx.saved_tensors
    rows = grad
    if ctx.with_weight and is_lists(pattern):
        rows = grad.index_select(0, ListTensors(*pattern).columns)
    rows = rows.to(at_least_fp32(rows.dtype))
    backward = calls.hadamard_update_backward if is_signs(pattern) else calls.sparse_update_backward
    d_lam, d_gamma = backward(rows, pattern, lam, gamma, ctx.scale, True, True)
    return [None] * len(pattern), d_lam, d_gamma, None, None, grad if ctx.with_weight else None, None


torch.library.register_autograd("randlora::sparse_update", _sparse_gradients, setup_context=_keep_sparse)
torch.library.register_autograd("randlora::hadamard_update", _sparse_gradients, setup_context=_keep_sparse)
