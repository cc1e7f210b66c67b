"""The best approximation of a matrix that has a given rank, and the rank that keeps a given share of its energy.

A full SVD of a d x d matrix takes some 20 d^3 multiply-adds, half of them at the speed of memory. LoRA's ranks are far
below d, and for these a block Krylov method finds the same singular vectors by some hundred products with the matrix:
every step multiplies a block of vectors with the matrix and its transpose and makes it orthogonal to all before it,
and the best approximation within the span of all of them is taken. It ends when the residuals of the singular triplets
are small, which bounds how far these are from true ones; where that takes too long, the Gram matrix is decomposed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Up to here LAPACK's SVD of the whole is fast enough, and as good as it gets.
SMALL = 512
_BLOCK = 1 << 22  # numbers that are cast at once
# Of ||G v - w v|| / w, G the Gram matrix, v a vector and w its value. Singular values are as good as its square.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-9}


def truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``B [a, rank]``, ``A [rank, b]`` whose product is the best approximation of `matrix` ``[a, b]`` of this rank.

    B's columns are orthogonal, with the singular values, largest first, as their norms; A's rows are orthonormal, or
    zero where there is nothing left. The same input gives the same bits on one device. `rank` is below both of ``a``
    and ``b``; fp32 or fp64.
    """
    # What follows squares numbers, which must stay within the range of fp32. A pass over all of them is worth sparing.
    largest = torch.stack(torch.aminmax(matrix)).abs().amax()
    exponent = torch.frexp(largest).exponent.clamp(-100, 100)  # torch.ldexp makes the power itself
    if exponent.abs() <= 20:
        return _truncated(matrix, rank)
    B, A = _truncated(torch.ldexp(matrix, -exponent), rank)
    return torch.ldexp(B, exponent), A


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if matrix.shape[0] < matrix.shape[1]:
        B, A = _truncated(matrix.T, rank)
        norms = B.norm(dim=0)
        return A.T * norms, (B / norms.clamp_min(torch.finfo(B.dtype).tiny)).T
    if min(matrix.shape) <= SMALL:
        U, S, V = torch.linalg.svd(matrix, full_matrices=False)
        return U[:, :rank] * S[:rank], V[:rank]
    found = _krylov(matrix, rank)
    V = _of_whole(matrix, rank) if found is None else found
    return _apart(matrix @ V, V)


def product_truncated(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same for the matrix ``left [a, P] @ right [P, b]`` with P below a and b, which is not built."""
    (Q1, R1), (Q2, R2) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    B, A = truncated(R1 @ R2.T, rank)
    return Q1 @ B, A @ Q2.T


def singular_values(matrix: Tensor) -> Tensor:
    """All of them, largest first, in float64; of an fp32 matrix those below 1e-8 of the largest are not exact."""
    if min(matrix.shape) <= SMALL or matrix.dtype == torch.float64:
        values: Tensor = torch.linalg.svdvals(matrix.double())
    else:
        values = torch.linalg.eigvalsh(_gram(matrix)).flip(0).clamp_min(0).sqrt()
    return values


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Those of ``left [a, P] @ right [P, b]`` with P below a and b."""
    R1, R2 = (torch.linalg.qr(t, mode="r").R for t in (left, right.T))
    return singular_values(R1 @ R2.T)


def rank_for(values: Tensor, energy: float, eps: float) -> int:
    """The smallest rank, at least 1, that keeps the share `energy` of the squares of these singular values.

    Args:
        eps: of the dtype that the matrix was made in: what rounding makes of nothing counts as nothing.
    """
    squares = values.double().square()
    left = squares.flip(0).cumsum(0).flip(0)  # [i]: the energy of all from i on, of which small ones are summed first
    allowed = ((1 - energy) + max(16 * len(values) * eps**2, 1e-12)) * left[0]
    return max(1, int((left > allowed).sum()))


def _krylov(matrix: Tensor, rank: int) -> Tensor | None:
    """The first right singular vectors ``[b, rank]`` of `matrix` ``[a, b]``, None if they are not found in time."""
    a, b = matrix.shape
    width = 16 if rank <= 32 else 32 if rank <= 128 else 64
    most = min(b // 2, 6 * rank + 16 * width) // width * width
    if most < rank + 4 * width:
        return None
    tolerance = _TOLERANCE[matrix.dtype]
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(b, width, generator=generator, dtype=torch.float64).to(matrix)
    Q = matrix.new_empty(b, most)
    W = matrix.new_empty(a, most, dtype=torch.float64)  # matrix @ Q
    H = W.new_zeros(most, most)  # W^T W, whose small values count, too
    n, look, before = 0, rank + 4 * width, (0, math.inf)
    while n < most:
        new, end = slice(n, n + width), n + width
        block = _orthogonal(block, Q[:, :n])
        Q[:, new], product = block, matrix @ block
        W[:, new] = product
        H[:end, new] = W[:, :end].T @ W[:, new]
        H[new, :end] = H[:end, new].T
        block, n = matrix.T @ product, end
        if n < look and n < most:
            continue
        values, vectors = torch.linalg.eigh(H[:n, :n])
        values, vectors = values[-rank:].flip(0), vectors[:, -rank:].flip(1)
        # G Q = Q H + rest, where only the last block has a rest.
        rest = block - Q[:, :n] @ (Q[:, :n].T @ block)
        residuals = (torch.linalg.qr(rest, mode="r").R.double() @ vectors[n - width :]).norm(dim=0)
        noise = (32 * torch.finfo(matrix.dtype).eps) ** 2 * values[0]
        worst = (residuals / values).where(values > noise, 0.0).max().item()
        if worst <= tolerance:
            if matrix.dtype == torch.float64:  # H, which has the squares, ends at 1e-8 of the largest value
                vectors = torch.linalg.svd(torch.linalg.qr(W[:, :n], mode="r").R).Vh[:rank].T
            found: Tensor = Q[:, :n] @ vectors.to(matrix)
            return found
        look, before = _next_look(n, worst, *before, tolerance, width), (n, worst)
    return None


def _next_look(n: int, worst: float, n_before: int, worst_before: float, tolerance: float, width: int) -> int:
    """When residuals will be small, as they fall by a factor with every vector: to look costs n^3."""
    steps = n // 8
    if worst < worst_before < math.inf:
        steps = int((n - n_before) * math.log(worst / tolerance) / math.log(worst_before / worst))
    return n + max(width, min(steps, n // 4))


def _orthogonal(block: Tensor, to: Tensor) -> Tensor:
    """An orthonormal block of the same size, with the same span beside that of `to`, whose columns are orthonormal."""
    limit = 8 * torch.finfo(block.dtype).eps
    for _ in range(5):  # once is not enough where little is left, nor twice where nothing is
        block = torch.linalg.qr(block - to @ (to.T @ block)).Q
        if not to.shape[1] or (to.T @ block).abs().max() <= limit:
            break
    return block


def _of_whole(matrix: Tensor, rank: int) -> Tensor:
    """The same by decomposing all of it; of fp64, whose Gram matrix would have to be in more bits, by an SVD."""
    if matrix.dtype == torch.float64:
        V: Tensor = torch.linalg.svd(matrix, full_matrices=False).Vh[:rank].T
        return V
    vectors: Tensor = torch.linalg.eigh(_gram(matrix)).eigenvectors
    return vectors[:, -rank:].flip(1).to(matrix)


def _gram(matrix: Tensor) -> Tensor:
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return _cross(tall, tall)


def _cross(left: Tensor, right: Tensor) -> Tensor:
    """``left^T right`` in float64, whose inputs are cast a few rows at a time."""
    total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device=left.device)
    step = max(1, _BLOCK // (left.shape[1] + right.shape[1]))
    for a, b in zip(left.split(step), right.split(step), strict=True):
        total.addmm_(a.double().T, b.double())
    return total


def _apart(W: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """``W V^T`` with W ``[a, k]`` turned so that its columns are orthogonal, which they are but for rounding."""
    values, turn = torch.linalg.eigh(_gram(W))
    turn = turn[:, values.argsort(descending=True)].to(W)
    return W @ turn, (V @ turn).T
