"""What the checks of bench/correct.py are made of: layers in float64 on the CPU, and the forms bases come in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("dense", "sparse", "very_sparse", "sign", "hadamard")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Relative errors, of norms: several times what a correct computation showed on the CPU, far below a wrong one.
ALLOWED = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float16: 0.003}
RANK, TOKENS, SCALE, SEED = 8, 50, 0.7, 2**40 + 3
Names = tuple[str, ...]


@dataclass(frozen=True)
class Check:
    """``run()`` gives pairs of a result and what it should be; errors above `allowed` are failures, 0: any bit."""

    about: dict[str, Any]
    results: Names
    allowed: float
    run: Callable[[], list[tuple[Tensor, Tensor]]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- forms ----


def forms(kind: str, device: torch.device) -> Names:
    """In which form bases of a kind come to the ops."""
    if kind == "very_sparse":
        return ("lists",) if device.type == "cpu" else ("bits",)
    return {"dense": ("dense", "seed"), "hadamard": ("signs",), "sparse": ("bits", "planes"), "sign": ("bits",)}[kind]


def given(bases: Any, form: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any, list[Tensor]]:
    """A, B and pattern, as the layer op takes them."""
    from randlora.bases import patterns

    if form == "dense":
        return *bases.draw(dtype, device), []
    if form == "signs":
        return None, None, list(bases.pattern(bases.min_dim, device)[0])
    if form == "seed":
        seed = patterns.StoredSeed(bases.seed, bases.r, bases.num_bases, bases.min_dim, bases.max_dim, device)
        return None, None, list(seed.tensors)
    A, B = bases.draw(torch.int8, device)
    A, columns, M = A[:, 0], iter([B.flatten(1)]), B.shape[0]
    if form == "bits":
        made = patterns.StoredBits(A, columns, M, patterns.planes_of(bases.sparsity))
    else:
        made = {"planes": patterns.StoredPlanes, "lists": patterns.StoredLists}[form](A, columns, M)
    return None, None, list(made.of(A.shape[1]))


class Problem:
    """A layer in float64 on the CPU."""

    def __init__(
        self, kind: str, in_features: int, out_features: int, rank: int = RANK, num_bases: int | None = None,
        tokens: int = TOKENS,
    ) -> None:  # fmt: skip
        import randlora

        self.wide = in_features <= out_features
        self.m, self.M = sorted((in_features, out_features))
        self.bases = randlora.RandomBases(self.M, self.m, rank, kind, num_bases=num_bases, seed=SEED)
        self.scale = SCALE * self.bases.scale
        self.n = self.bases.num_bases
        self.x, self.g = normal(tokens, in_features, seed=1), normal(tokens, out_features, seed=2)
        self.weight, self.bias = (
            normal(out_features, in_features, seed=3) / in_features**0.5,
            normal(out_features, seed=4),
        )
        self.lam, self.gamma = normal(rank, self.n, seed=5), normal(self.n, self.m, seed=6) / self.M
        self.A, self.B = (t.double() for t in self.bases.draw(torch.float64, torch.device("cpu")))

    def update(self, lam: Tensor, gamma: Tensor) -> Tensor:
        """dW [out, in]"""
        found = self.B.flatten(1) @ (self.scale * lam[:, :, None] * self.A * gamma).flatten(0, 1)
        return found if self.wide else found.T

    def expected(self, mask: Tensor | float) -> list[Tensor]:
        """y, dx, dlambda, dgamma; `mask` [T, in] is the dropout's, on the update's input alone."""
        x, lam, gamma = (t.clone().requires_grad_() for t in (self.x, self.lam, self.gamma))
        y = x @ self.weight.T + self.bias + (x * mask) @ self.update(lam, gamma).T
        return [y.detach(), *torch.autograd.grad(y, (x, lam, gamma), self.g)]
