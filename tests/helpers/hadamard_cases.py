"""Layers with Hadamard bases for tests of the ops: the pattern that an op takes, and A and B written out."""

import pytest
import torch
import torch.nn.functional as F

from helpers.common import STRATEGIES, normal, reference_dW
from randlora.functional import linear

# in, out, r, n (0: as many as rank needs), width
SHAPES = [
    (1, 1, 1, 0, 1), (3, 1, 4, 0, 2), (1, 41, 1, 0, 8), (3, 41, 4, 0, 1), (41, 96, 1, 0, 8), (41, 96, 12, 0, 2),
    (96, 41, 12, 0, 1), (96, 96, 32, 0, 1), (96, 341, 33, 0, 1), (341, 96, 33, 2, 1), (341, 341, 32, 0, 8),
    (384, 640, 12, 0, 8), (640, 384, 32, 0, 8), (384, 384, 32, 0, 8), (1000, 41, 128, 0, 1), (341, 1000, 128, 0, 2),
    (640, 341, 32, 3, 4), (96, 341, 4, 70, 8), (1000, 1000, 32, 0, 4),
]  # fmt: skip
SOME = [(341, 341, 32, 0, 8), (384, 640, 12, 0, 8), (640, 384, 32, 0, 8), (341, 96, 33, 2, 1)]


def shape_id(shape):
    return "{}to{}r{}n{}w{}".format(*shape)


shapes = pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
some_shapes = pytest.mark.parametrize("shape", SOME, ids=shape_id)
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def words(signs):
    """int32 words of a vector of signs, and one word more."""
    bits = F.pad((signs < 0).long(), (0, 32 + -len(signs) % 32)).view(-1, 32)
    return (bits << torch.arange(32)).sum(1).to(torch.int32)


def walsh(x, y):
    """(-1)^popcount(x & y) for all x below `x` and y below `y`."""
    z = torch.arange(x)[:, None] & torch.arange(y)
    parity = torch.zeros_like(z)
    while z.any():
        parity, z = parity ^ (z & 1), z >> 1
    return 1.0 - 2.0 * parity.double()


class Layer:
    """Everything of a layer, drawn at random, with bases as the op takes them and written out."""

    def __init__(self, shape, dtype=torch.float64, parameter_dtype=None, device="cpu", tokens=(2, 5)):
        self.i, self.o, r, n, width = shape
        m, M = min(self.i, self.o), max(self.i, self.o)
        n = n or -(-m // r)
        a, b, c = (normal(size, seed=seed, dtype=torch.float64).sign() for seed, size in enumerate((m, M, n * r)))
        self.pattern = [t.to(device) for t in (*map(words, (a, b, c)), torch.empty(width, 0, dtype=torch.int8))]
        R = 1 << (r - 1).bit_length()
        A = walsh(r, R)[:, torch.arange(m) // width % R] * a
        B = (walsh(M, n * r) * b[:, None] * c).view(M, n, r)
        self.A, self.B = A[:, None].to(device, dtype), B.to(device, dtype)
        parameter_dtype = parameter_dtype or dtype
        self.lam = normal(r, n, seed=3, dtype=parameter_dtype, device=device)
        self.gamma = normal(n, m, seed=4, dtype=parameter_dtype, device=device)
        self.x = normal(*tokens, self.i, seed=5, dtype=dtype, device=device)
        self.weight = normal(self.o, self.i, seed=6, dtype=dtype, device=device)
        self.bias = normal(self.o, seed=7, dtype=dtype, device=device)
        for t in self.inputs:
            t.requires_grad_()

    @property
    def inputs(self):
        return self.x, self.bias, self.lam, self.gamma

    def __call__(self, strategy, **options):
        given = {"x": self.x, "weight": self.weight, "bias": self.bias} | options
        parameters = self.lam, self.gamma
        return linear(*(given.pop(name) for name in ("x", "weight", "bias")), None, None, *parameters, 0.7,
                      strategy=strategy, pattern=self.pattern, **given)  # fmt: skip

    def dW(self, lam=None, gamma=None):
        lam, gamma = self.lam if lam is None else lam, self.gamma if gamma is None else gamma
        return reference_dW(self.A, self.B, lam, gamma, 0.7, self.i, self.o)

    def exact(self, mask=1.0):
        x, weight, bias = (t.double() for t in (self.x, self.weight, self.bias))
        return F.linear(x, weight, bias) + (x * mask) @ self.dW().T


def gradients(y, inputs, seed=9):
    return torch.autograd.grad(y, inputs, normal(*y.shape, seed=seed, dtype=y.dtype, device=y.device))


def assert_close(got, expected, tolerance=1e-10):
    size = expected.abs().max().item() if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * size)
