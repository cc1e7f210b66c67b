"""Fused experts with dense RandLoRA updates in plain PyTorch, as fast as we could write it.

Experts share B, so one product with it serves all tokens; the other one is with each expert's own scaled bases, which
exist for all experts at once, ``[experts, n*r, min_dim]``, and are kept for backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Experts(nn.Module):
    """transformers' gated experts with an update of both parameters. lambda is zero, so that it changes nothing."""

    def __init__(self, base: Any, r: int, scaling: float, compiled: bool = False) -> None:
        super().__init__()
        self.base, self.num_experts = base, base.num_experts
        self.parts = nn.ModuleDict(
            {name: Part(getattr(base, name), r, scaling) for name in ("gate_up_proj", "down_proj")}
        )
        self.compute = torch.compile(self._compute) if compiled else self._compute

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.compute(hidden, ids, weights)

    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        top_k, flat = ids.shape[1], ids.reshape(-1)
        order = flat.argsort(stable=True)
        # As transformers counts: bincount has a result whose size the compiler does not know.
        counts = torch.histc(flat.float(), bins=self.num_experts, min=0, max=self.num_experts - 1)
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = self.parts["gate_up_proj"](hidden[order // top_k], ends).chunk(2, dim=-1)
        y = self.parts["down_proj"](self.base.act_fn(gate) * up, ends)
        y = y * weights.reshape(-1)[order].unsqueeze(1)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return y[back].unflatten(0, (-1, top_k)).sum(1)


class Part(nn.Module):
    """``weight [experts, out, in]``, its lambda ``[experts, r, n]`` and gamma ``[experts, n, min_dim]``."""

    def __init__(self, weight: Tensor, r: int, scaling: float) -> None:
        super().__init__()
        import randlora
        from randlora.bases.definition import bases_for_full_rank

        experts, out_features, in_features = weight.shape
        m, M = sorted((in_features, out_features))
        n = bases_for_full_rank(m, r)
        self.scaling, self.wide = scaling, in_features <= out_features
        A, B = randlora.RandomBases(M, m, r, num_bases=n).tensors(weight.dtype, weight.device)
        self.weight = weight
        for name, value in (("A", A), ("B2", B.flatten(1))):
            self.register_buffer(name, value, persistent=False)
        self.randlora_lambda = nn.Parameter(torch.zeros(experts, r, n, device=weight.device))
        self.randlora_gamma = nn.Parameter(torch.full((experts, n, m), 1 / M, device=weight.device))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        y = F.grouped_mm(x, self.weight.mT, offs=ends)
        S2 = self.scaled().to(x.dtype).flatten(1, 2)
        if self.wide:
            return y + F.grouped_mm(x, S2.mT, offs=ends) @ self.B2.T
        return y + F.grouped_mm(x @ self.B2, S2, offs=ends)

    def scaled(self) -> Tensor:
        """``[experts, r, n, m]``"""
        lam, gamma = self.randlora_lambda * self.scaling, self.randlora_gamma
        return lam[:, :, :, None] * (self.A[None] * gamma[:, None])


def updates(experts: Any) -> dict[str, Callable[[int], Tensor]]:
    """Name of a parameter -> what gives an expert's update by the formula, in float64; of ours and of the above."""
    found = {}
    if isinstance(experts, Experts):
        for name, part in experts.parts.items():
            trained = part.randlora_lambda, part.randlora_gamma
            found[name] = functools.partial(_update, part.A, part.B2, part.scaling, *trained, part.wide)
        return found
    for part in experts.adapted():
        lam, gamma, bases = part.randlora_lambda["default"], part.randlora_gamma["default"], part.bases["default"]
        m, M = sorted((part.in_features, part.out_features))
        A, B = bases.draw(part.weight.dtype, part.weight.device)
        A, B2 = A[:, :, :m], B[:M, : lam.shape[-1]].flatten(1)
        scaling, wide = part.scaling["default"] * bases.scale, part.in_features <= part.out_features
        found[part.weight_name] = functools.partial(_update, A, B2, scaling, lam, gamma, wide)
    return found


def _update(A: Tensor, B2: Tensor, scaling: float, lam: Tensor, gamma: Tensor, wide: bool, expert: int) -> Tensor:
    left, right = lam[expert].detach().double()[:, :, None], gamma[expert].detach().double()[None]
    S2 = (scaling * left * A.double() * right).flatten(0, 1)
    return B2.double() @ S2 if wide else S2.T @ B2.double().T
