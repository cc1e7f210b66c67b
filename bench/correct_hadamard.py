"""Checks of the ops of Hadamard bases for bench/correct.py: every size that their kernels have a case for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.correct_problems import ALLOWED, DTYPES, Check, Problem, given, name_of, normal

# rank, bases, m, M, tokens: groups and bases of every size that a kernel has a case for, few tokens and, with 16-bit
# ones, more than a chunk of intermediates holds; transforms of one thread's elements up to the longest.
HADAMARD = ((1, None, 5, 9, 3), (4, None, 64, 96, 50), (12, 10, 107, 1000, 8), (32, None, 384, 640, 9),
            (33, None, 130, 5000, 5), (128, None, 341, 341, 50), (300, 2, 41, 600, 10), (32, 128, 256, 300, 1000),
            (32, 1000, 40, 70, 700), (3, 41, 104, 260, 200), (32, 24, 768, 770, 400), (2, 128, 256, 260, 999),
            (2, 256, 512, 520, 150), (1, 200, 200, 210, 300), (128, 256, 264, 270, 530))  # fmt: skip


def hadamard_checks(device: torch.device, few: bool, layers: bool = True) -> Iterator[Check]:
    """Tokens up and down and what they give the parameters; dW with and without a weight, and what it gives them.

    Without `layers` no call takes cuBLAS's products.
    """
    for rank, num_bases, *sizes, tokens in HADAMARD[1:6] if few else HADAMARD:
        problem = Problem("hadamard", *sizes, rank, num_bases, tokens if layers else min(tokens, 8))
        for dtype in DTYPES:
            if dtype == torch.float64 and rank * problem.n > 16384:
                continue

            def tokens_of(problem=problem, dtype=dtype) -> list[tuple[Tensor, Tensor]]:
                return hadamard_tokens(problem, dtype, device, layers)

            def update(problem=problem, dtype=dtype) -> list[tuple[Tensor, Tensor]]:
                return hadamard_updates(problem, dtype, device)

            about = {"kind": "hadamard", "dtype": name_of(dtype), "shape": (rank, problem.n, *sizes, tokens)}
            yield Check({"op": "hadamard"} | about, ("up", "down", *HADAMARD_GRADIENTS), ALLOWED[dtype], tokens_of)
            yield Check({"op": "hadamard_update"} | about, ("D", "rows", "columns", "dlambda", "dgamma"),
                        ALLOWED[dtype], update)  # fmt: skip


HADAMARD_GRADIENTS = ("dlambda", "dgamma", "dlambda", "dgamma", "into narrow", "dlambda", "dgamma", "into wide")


def hadamard_tokens(
    problem: Problem, dtype: torch.dtype, device: torch.device, products: bool
) -> list[tuple[Tensor, Tensor]]:
    ops, pattern = torch.ops.randlora, given(problem.bases, "signs", dtype, device)[2]
    lam, gamma = (t.to(device, torch.promote_types(dtype, torch.float32)) for t in (problem.lam, problem.gamma))
    # The reference starts from what the op is given.
    narrow, wide, before_narrow, before_wide = (
        t.to(dtype) for t in (problem.x, problem.g, normal(*problem.x.shape, seed=7), normal(*problem.g.shape, seed=8))
    )
    x, g, options = narrow.double(), wide.double(), (pattern, lam, gamma, problem.scale)
    leaves = [t.clone().requires_grad_() for t in (problem.lam, problem.gamma)]
    D = problem.update(*leaves).T
    gradients = torch.autograd.grad(D, leaves, x.T @ g)
    D = D.detach()
    after_narrow, after_wide = before_narrow.double() + g @ D.T, before_wide.double() + x @ D
    narrow, wide = narrow.to(device), wide.to(device)

    up, down = (t.to(device, copy=True) for t in (before_wide, before_narrow))
    ops.hadamard_up_(up, narrow, *options)
    ops.hadamard_down_(down, wide, *options)
    found = [(up, after_wide), (down, after_narrow)]
    if products:
        for into_narrow, into_wide in ((None, None), (before_narrow, None), (None, before_wide)):
            into = [None if t is None else t.to(device, copy=True) for t in (into_narrow, into_wide)]
            found += zip(ops.hadamard_gradients(narrow, wide, *into, *options), gradients, strict=True)
            pairs = zip(into, (after_narrow, after_wide), strict=True)
            found += [(got, after) for got, after in pairs if got is not None]
    return found


def hadamard_updates(problem: Problem, dtype: torch.dtype, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    ops, pattern = torch.ops.randlora, given(problem.bases, "signs", dtype, device)[2]
    accumulator = torch.promote_types(dtype, torch.float32)
    lam, gamma = (t.to(device, accumulator) for t in (problem.lam, problem.gamma))
    leaves = [t.clone().requires_grad_() for t in (problem.lam, problem.gamma)]
    D, W, G = problem.update(*leaves).T, problem.weight.T, normal(problem.m, problem.M, seed=9)
    gradients = torch.autograd.grad(D, leaves, G)
    D, W, options = D.detach(), W.to(dtype), (pattern, lam, gamma, problem.M, problem.scale)
    weights = W.contiguous().to(device), W.T.contiguous().to(device).T
    return [
        (ops.hadamard_update(*options, None, dtype), D),
        *((ops.hadamard_update(*options, weight, dtype), D + W.double()) for weight in weights),
        *zip(ops.hadamard_update_backward(G.to(device, accumulator), pattern, lam, gamma, problem.scale, True, True),
             gradients, strict=True),
    ]  # fmt: skip
