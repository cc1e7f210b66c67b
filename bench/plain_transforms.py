"""The update of Hadamard bases in plain PyTorch, as well as it can be written: small products and transforms.

A transform of length ``2^(p + q)`` is two products with Hadamard matrices of ``2^p`` and ``2^q``, which is what PyTorch
does fastest. It is differentiated by autograd, which keeps what it likes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def hadamard(size: int, like: Tensor) -> Tensor:
    """``(-1)^popcount(x & y)`` of all x and y below `size`, a power of two."""
    found = like.new_ones(1, 1)
    while len(found) < size:
        found = torch.cat((torch.cat((found, found), 1), torch.cat((found, -found), 1)))
    return found


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, c: Tensor, short: Tensor, left: Tensor,
    right: Tensor, lam: Tensor, gamma: Tensor, scaling: float, width: int,
) -> Tensor:  # fmt: skip
    """``x [T, in]`` to ``[T, out]``, in <= out: csrc/hadamard.h. `short` is ``[r, R]``; `left` and `right` are the
    matrices of the long transform.
    """
    (r, n), (T, m), R, M = lam.shape, x.shape, short.shape[1], len(weight)
    groups = (n, m // (width * R), R, width)
    by_group = (gamma.to(x.dtype) * a).view(groups).permute(2, 1, 3, 0).reshape(R, -1, n)
    tokens = x.view(T, *groups[1:]).permute(2, 0, 1, 3).reshape(R, T, -1)
    v = (short @ torch.bmm(tokens, by_group).view(R, T * n)).view(r, T, n)
    h = (v * ((lam * scaling).to(x.dtype) * c.view(r, n))[:, None]).transpose(0, 1).reshape(T, r * n)
    h = F.pad(h, (0, len(left) * len(right) - r * n)).view(T, len(left), len(right))
    update = (left @ (h @ right)).flatten(1)[:, :M] * b
    return F.linear(x, weight, bias) + update


@functools.cache
def compiled() -> Callable[..., Tensor]:
    return torch.compile(forward, fullgraph=True, dynamic=False)


class Linear(nn.Module):
    """Wraps an ``nn.Linear`` with in <= out whose columns fill all groups (ValueError), as :class:`bench.plain.Linear`.

    Args:
        A, B: ``[r, 1, m]`` and ``[M, n, r]`` with Hadamard bases written out.
        width: of a group.
    """

    def __init__(self, base_layer: nn.Linear, A: Tensor, B: Tensor, width: int, scaling: float, fast: bool) -> None:
        super().__init__()
        weight = base_layer.weight.requires_grad_(False)
        (M, m), r, n = weight.shape, A.shape[0], B.shape[1]
        R = 1 << (r - 1).bit_length()
        if m > M or m % (width * R) or n * r > M:
            raise ValueError(f"in <= out with in a multiple of {width * R} only, and no more bases, got {m} -> {M}")
        levels = (M - 1).bit_length()
        self.base_layer, self.scaling, self.width, self.fast = base_layer, scaling, width, fast
        tensors = {
            "a": A[0, 0], "b": B[:, 0, 0] * B[0, 0, 0], "c": B[0].flatten(), "short": hadamard(R, A)[:r],
            "left": hadamard(1 << levels // 2, A), "right": hadamard(1 << levels - levels // 2, A),
        }  # fmt: skip
        for name, t in tensors.items():
            self.register_buffer(name, t.contiguous(), persistent=False)
        self.randlora_lambda = nn.Parameter(torch.zeros(r, n, device=weight.device))
        self.randlora_gamma = nn.Parameter(torch.full((n, m), 1 / M, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        function = compiled() if self.fast else forward
        base = self.base_layer
        y = function(
            x.reshape(-1, x.shape[-1]), base.weight, base.bias, self.a, self.b, self.c, self.short, self.left,
            self.right, self.randlora_lambda, self.randlora_gamma, self.scaling, self.width,
        )  # fmt: skip
        return y.unflatten(0, x.shape[:-1])
