"""The update of one layer, taken apart into LoRA's two factors, and what that loses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.randlora_layer import RandLoraLayer
from .low_rank import product_singular_values, product_truncated, rank_for, singular_values, truncated

_BLOCK = 1 << 22  # numbers of dW in a block of rows
_PIECE = 1 << 16  # in fp32 the sum of so many squares is good to 1e-6


class Factors(NamedTuple):
    """``dW [out, in]`` is near ``B [out, rank] @ A [rank, in]``."""

    A: Tensor
    B: Tensor


class LayerUpdate:
    """dW of one adapter in one layer, ``[out, in]``, as a product ``left [out, P] @ right [P, in]`` or as a matrix.

    The product is kept where P is so small that it is cheaper to compute with; never both.
    """

    def __init__(self, layer: RandLoraLayer, adapter: str, rank: int | None = None) -> None:
        """`rank`: the one that is asked for, None where only the singular values are."""
        self.inner = layer.num_bases[adapter] * layer.r[adapter]
        self.narrow = min(layer.in_features, layer.out_features)
        self.rank = min(self.inner, self.narrow)  # what dW has at most
        exact = rank is not None and rank >= self.rank
        self.left = self.right = self.matrix = None
        # Where P is near m, two QR decompositions cost more than dW.
        few = self.inner * (2 if rank is None else 4) <= self.narrow
        if few or (exact and self.inner <= self.narrow):
            first, second = layer.get_scaled_bases(adapter)
            # The scaled base takes the factor: the other one belongs to all layers.
            scaling = layer.scaling[adapter]
            if layer.in_features <= layer.out_features:
                self.left, self.right = second, first * scaling
            else:
                self.left, self.right = second * scaling, first
        else:
            update = layer.get_delta_weight(adapter)
            self.matrix = update.T if layer.fan_in_fan_out else update

    @property
    def dtype(self) -> torch.dtype:
        tensor = self.left if self.matrix is None else self.matrix
        assert tensor is not None
        return tensor.dtype

    def rank_for(self, energy: float) -> int:
        """The smallest rank that keeps this share of the energy, 1 at least."""
        if self.matrix is None:
            assert self.left is not None and self.right is not None
            values = product_singular_values(self.left, self.right)
        else:
            values = singular_values(self.matrix)
        return rank_for(values, energy, torch.finfo(self.dtype).eps)

    def factors(self, rank: int) -> Factors:
        """Those of the best approximation of this rank, or of dW itself where its rank is not above; not padded."""
        if self.matrix is None:
            assert self.left is not None and self.right is not None
            exact = rank >= self.inner
            B, A = (self.left, self.right) if exact else product_truncated(self.left, self.right, rank)
        elif rank < self.narrow:
            B, A = truncated(self.matrix, rank)
        else:
            out_features, in_features = self.matrix.shape
            one = torch.eye(self.narrow, dtype=self.matrix.dtype, device=self.matrix.device)
            B, A = (one, self.matrix) if out_features <= in_features else (self.matrix, one)
        return _balanced(A, B)

    def norms(self, factors: Factors) -> tuple[float, float]:
        """The Frobenius norms of dW and of what the factors lack, measured, in blocks of rows."""
        total = lost = 0.0
        A = factors.A.to(self._device, self.dtype)
        for rows, block in self._blocks():
            B = factors.B[rows].to(self._device, self.dtype)
            total += _energy(block)
            lost += _energy(torch.addmm(block, B, A, alpha=-1))
        return total**0.5, lost**0.5

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        tensor = self.left if self.matrix is None else self.matrix
        assert tensor is not None
        in_features = tensor.shape[1] if self.right is None else self.right.shape[1]
        step = max(1, _BLOCK // in_features)
        for start in range(0, len(tensor), step):
            rows = slice(start, start + step)
            yield rows, tensor[rows] if self.right is None else tensor[rows] @ self.right

    @property
    def _device(self) -> torch.device:
        tensor = self.left if self.matrix is None else self.matrix
        assert tensor is not None
        return tensor.device


def _balanced(A: Tensor, B: Tensor) -> Factors:
    """A's rows and B's columns times powers of two, so that both are of one size: no 16-bit range is left for nothing.

    The product is the same to the last bit, and so is every number but for its exponent.
    """
    largest_A, largest_B = A.abs().amax(dim=1), B.abs().amax(dim=0)
    exponent = (torch.frexp(largest_B).exponent - torch.frexp(largest_A).exponent) // 2
    exponent = exponent.where((largest_A > 0) & (largest_B > 0), 0)
    return Factors(torch.ldexp(A, exponent[:, None]), torch.ldexp(B, -exponent))


def _energy(block: Tensor) -> float:
    """The sum of squares: of pieces as BLAS sums them, twenty times faster than after a cast, and then in float64."""
    pieces = torch.stack([torch.dot(piece, piece) for piece in block.reshape(-1).split(_PIECE)])
    total = pieces.double().sum()
    if not 1e-25 < total < 1e30:  # squares that are too large or too small for fp32
        total = torch.linalg.vector_norm(block, dtype=torch.float64).square()
    return total.item()
