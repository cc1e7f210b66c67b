"""The layer op and its backward, called by the names of their arguments (csrc/layer/arguments.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import calls

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


def call_linear(x: Tensor, lam: Tensor, gamma: Tensor, bias: Tensor | None, fixed: Fixed) -> Tensor:
    weight, A, B, seed, pattern, settings = fixed
    return calls.linear(
        x, weight, bias, A, B, lam, gamma, pattern, seed,
        out_features=settings.out_features, scale=settings.scale, dtype=settings.dtype, strategy=settings.strategy,
        dropout=settings.dropout, weight_is_transposed=settings.weight_is_transposed, workspace=settings.workspace,
        backward_strategy=settings.backward_strategy,
    )  # fmt: skip


def call_linear_backward(
    grad: Tensor, x: Tensor, lam: Tensor, gamma: Tensor, fixed: Fixed, needs: Needs
) -> tuple[Tensor, Tensor, Tensor]:
    weight, A, B, seed, pattern, settings = fixed
    return calls.linear_backward(
        grad, x, weight, A, B, lam, gamma, pattern, seed,
        scale=settings.scale, dtype=settings.dtype, strategy=settings.backward_strategy, dropout=settings.dropout,
        weight_is_transposed=settings.weight_is_transposed, workspace=settings.workspace,
        need_x=needs.x, need_lambda=needs.randlora_lambda, need_gamma=needs.randlora_gamma,
    )  # fmt: skip
