"""The operators of the compiled part that randlora calls, with the types of their arguments (schemas: csrc/ops.cpp).

Each name is the operator itself, so that a call costs no more than torch asks for; a checker sees a function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:

    def fill_bases_(
        out: Tensor, seed: int, stream: int, offsets: Sequence[int], sparsity: float | None = None
    ) -> None: ...
    def check_pattern(pattern: Sequence[Tensor]) -> None: ...
    def unique_base(
        A: Tensor,
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        scale: float = 1.0,
        dtype: torch.dtype | None = None,
    ) -> Tensor: ...
    def unique_base_backward(
        grad: Tensor,
        A: Tensor,
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        scale: float = 1.0,
        need_lambda: bool = True,
        need_gamma: bool = True,
    ) -> tuple[Tensor, Tensor]: ...
    def sparse_update(
        pattern: Sequence[Tensor],
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        max_dim: int,
        scale: float,
        weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor: ...
    def sparse_update_backward(
        grad: Tensor,
        pattern: Sequence[Tensor],
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        scale: float,
        need_lambda: bool,
        need_gamma: bool,
    ) -> tuple[Tensor, Tensor]: ...
    def hadamard_update(
        pattern: Sequence[Tensor],
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        max_dim: int,
        scale: float,
        weight: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor: ...
    def hadamard_update_backward(
        grad: Tensor,
        pattern: Sequence[Tensor],
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        scale: float,
        need_lambda: bool,
        need_gamma: bool,
    ) -> tuple[Tensor, Tensor]: ...
    def linear(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        pattern: Sequence[Tensor],
        seed: Tensor | None,
        *,
        out_features: int,
        scale: float,
        dtype: torch.dtype,
        strategy: str,
        dropout: float,
        weight_is_transposed: bool,
        workspace: int,
        backward_strategy: str | None = None,
    ) -> Tensor: ...
    def linear_backward(
        grad: Tensor,
        x: Tensor,
        weight: Tensor | None,
        A: Tensor | None,
        B: Tensor | None,
        randlora_lambda: Tensor,
        randlora_gamma: Tensor,
        pattern: Sequence[Tensor],
        seed: Tensor | None,
        *,
        scale: float,
        dtype: torch.dtype,
        strategy: str,
        dropout: float,
        weight_is_transposed: bool,
        workspace: int,
        need_x: bool,
        need_lambda: bool,
        need_gamma: bool,
    ) -> tuple[Tensor, Tensor, Tensor]: ...
    def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor: ...

else:
    fill_bases_ = torch.ops.randlora.fill_bases_.default
    check_pattern = torch.ops.randlora.check_pattern.default
    unique_base = torch.ops.randlora.unique_base.default
    unique_base_backward = torch.ops.randlora.unique_base_backward.default
    sparse_update = torch.ops.randlora.sparse_update.default
    sparse_update_backward = torch.ops.randlora.sparse_update_backward.default
    hadamard_update = torch.ops.randlora.hadamard_update.default
    hadamard_update_backward = torch.ops.randlora.hadamard_update_backward.default
    linear = torch.ops.randlora.linear.default
    linear_backward = torch.ops.randlora.linear_backward.default
    dropout = torch.ops.randlora.dropout.default
