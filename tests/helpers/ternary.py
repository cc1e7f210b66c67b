"""Layers drawn at random with ternary or Hadamard bases, or the seed of dense ones: in every form of a pattern."""

import torch

import randlora
from helpers.common import normal

# name -> arguments of RandomBases: lists from sparsity 10 on, planes from 2.5 on, bits below (CUDA: bits always).
FORMS = {
    "lists": {"kind": "very_sparse", "sparsity": 10.0},
    "planes": {"kind": "sparse"},
    "dense planes": {"kind": "sparse", "sparsity": 2.5},
    "bits": {"kind": "sparse", "sparsity": 1.5},
    "sign": {"kind": "sign"},
}
ALL_FORMS = FORMS | {"hadamard": {"kind": "hadamard"}, "seed": {"kind": "dense", "keep": False}}


def draw(shape, form, dtype=torch.float64, device="cpu", tokens=6, num_bases=None):
    """x, weight, bias, lambda, gamma, and bases that are larger than the layer."""
    i, o, r = shape
    m, M = min(i, o), max(i, o)
    n = num_bases or -(-m // r)
    bases = randlora.RandomBases(M + 20, m + 3, r, seed=7, num_bases=n + 1, **ALL_FORMS[form])
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    x = normal(2, tokens, i, seed=5, dtype=dtype, device=device).requires_grad_()
    weight, bias = normal(o, i, seed=6, dtype=dtype, device=device), normal(o, seed=8, dtype=dtype, device=device)
    lam = normal(r, n, seed=2, dtype=parameters, device=device).requires_grad_()
    gamma = (normal(n, m, seed=3, dtype=parameters, device=device) / n**0.5).requires_grad_()
    return x, weight, bias, lam, gamma, bases
