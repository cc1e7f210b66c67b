"""Random layers for the layer op, and what it must give, in float64."""

import torch
import torch.nn.functional as F

from helpers.common import draw_factors, normal, reference_dW


def draw_layer(shape, dtype=torch.float64, parameter_dtype=None, device="cpu", num_bases=None, tokens=5):
    """x, weight, bias, A, B (larger than needed), lambda, gamma; all but A, B and weight ask for gradients."""
    i, o, r = shape
    m, M = min(i, o), max(i, o)
    n = num_bases or -(-m // r)
    A, lam, gamma = draw_factors(r, n, m, dtype, parameter_dtype, device)
    A = torch.cat([A, A[:, :, :1]], dim=2)
    B = normal(M + 2, n + 1, r, seed=4, dtype=dtype, device=device)
    x = normal(2, tokens, i, seed=5, dtype=dtype, device=device)
    weight, bias = normal(o, i, seed=6, dtype=dtype, device=device), normal(o, seed=7, dtype=dtype, device=device)
    for t in (x, bias, lam, gamma):
        t.requires_grad_()
    return x, weight, bias, A, B, lam, gamma


# Of the raw op's backward.
ALL_GRADIENTS = {"need_x": True, "need_lambda": True, "need_gamma": True}


def op_options(dtype, strategy):
    """What is not a tensor for the raw op and its backward; the forward needs `out_features`, too."""
    return {
        "scale": 0.7, "dtype": dtype, "strategy": strategy, "dropout": 0.0, "weight_is_transposed": False,
        "workspace": 0,
    }  # fmt: skip


def reference(x, weight, bias, A, B, lam, gamma, scaling, mask=1.0):
    dW = reference_dW(A, B, lam, gamma, scaling, x.shape[-1], weight.shape[0])
    y = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return y + (x.double() * mask) @ dW.T


def gradients(y, inputs, seed=9):
    """Of `inputs`, for a gradient of `y` that is random and the same for results of one shape."""
    return torch.autograd.grad(y, inputs, normal(*y.shape, seed=seed, dtype=y.dtype, device=y.device))


def mask_of(x, seed, p):
    """The mask that the op draws, as tests/ops/test_dropout.py compares it with its definition."""
    return torch.ops.randlora.dropout(torch.ones_like(x), seed, p).double()
