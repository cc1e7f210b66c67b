"""RandLoRA as functions of tensors, without modules (arXiv 2502.00987; layout in the notes of :func:`flat_bases`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import UniqueBaseGrad


def unique_base(
    A: Tensor,
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The scaled base ``S[k,i,j] = scale * lambda[k,i] * A[k,0,j] * gamma[i,j]`` (PEFT: ``UniqueBaseGrad``).

    Args:
        A: ``[r, 1, m]``, gets no gradient; any strides.
        randlora_lambda: ``[r, n]``.
        randlora_gamma: ``[n, m]``. The three may have different dtypes of float64, float32, bfloat16, float16.
        scale: a factor folded in at no cost.
        dtype: of the result; default: the promoted dtype of the inputs.

    Returns:
        ``[r, n, m]``, computed in fp32 (fp64 if an input or the result is) and rounded once.

    Raises:
        ValueError: shapes or devices that do not fit, empty tensors. TypeError: other dtypes.
    """
    return UniqueBaseGrad.apply(A, randlora_lambda, randlora_gamma, scale, dtype)


def flat_bases(
    A: Tensor,
    B: Tensor,
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
    scaling: float,
    in_features: int,
    out_features: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """``S2 [n*r, m]``, scaled, and ``B2 [M, n*r]`` with ``m = min(in, out)``, ``M = max(in, out)``.

    ``A [r, 1, >= m]`` and ``B [>= M, >= n, r]`` are sliced; without `dtype` both results have the promoted one.

    Row p of S2 is base (k, i) with ``p = k*n + i``, column p of B2 is (i, k) with ``p = i*r + k``, and they are
    multiplied p with p although the orders differ. As B is i.i.d. this only relabels its columns, but every RandLoRA
    checkpoint is trained with it, so it stays.

    Raises:
        ValueError: bases too small for the layer, or parameters of other sizes.
    """
    m, M = min(in_features, out_features), max(in_features, out_features)
    r, n = randlora_lambda.shape if randlora_lambda.dim() == 2 else (-1, -1)
    if A.dim() != 3 or A.shape[0] != r or A.shape[2] < m:
        raise ValueError(
            f"A must have shape [r, 1, >= m] = [{r}, 1, >= {m}] for a {in_features} -> {out_features} "
            f"layer with lambda {list(randlora_lambda.shape)}, got {list(A.shape)}"
        )
    if B.dim() != 3 or B.shape[0] < M or B.shape[1] < n or B.shape[2] != r:
        raise ValueError(
            f"B must have shape [>= M, >= n, r] = [>= {M}, >= {n}, {r}] for a {in_features} -> "
            f"{out_features} layer with lambda {list(randlora_lambda.shape)}, got {list(B.shape)}"
        )
    dtype = dtype or torch.promote_types(
        B.dtype,
        torch.promote_types(A.dtype, torch.promote_types(randlora_lambda.dtype, randlora_gamma.dtype)),
    )
    S2 = unique_base(A[:, :, :m], randlora_lambda, randlora_gamma, scaling, dtype).reshape(r * n, m)
    B2 = B[:M, :n].reshape(M, n * r).to(dtype)
    return S2, B2


def delta_weight(
    A: Tensor,
    B: Tensor,
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
    scaling: float,
    in_features: int,
    out_features: int,
) -> Tensor:
    """``dW [out, in] = scaling * sum_i B_i diag(lambda_i) A diag(gamma_i)`` (paper, eq. 3), differentiable.

    Arguments and errors as for :func:`flat_bases`; the result has the promoted dtype of the tensors.
    """
    S2, B2 = flat_bases(A, B, randlora_lambda, randlora_gamma, scaling, in_features, out_features)
    return B2 @ S2 if in_features <= out_features else S2.T @ B2.T


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
) -> Tensor:
    """``y = x W^T + bias + dropout(x) dW^T``: a linear layer with its RandLoRA update.

    Args:
        x: ``[..., in]``. weight: ``[out, in]``. bias: ``[out]`` or None.
        A, B, randlora_lambda, randlora_gamma, scaling: as for :func:`flat_bases`.
        dropout: probability, applied to the update's input only while `training`.

    Returns:
        ``[..., out]`` in the dtype that ``torch.nn.functional.linear`` gives (autocast included); the update is
        computed in that dtype, whatever that of lambda and gamma.
    """
    result = F.linear(x, weight, bias)
    return add_update(result, x, A, B, randlora_lambda, randlora_gamma, scaling, dropout if training else 0.0)


def add_update(
    result: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """``result + dropout(x) dW^T`` in the dtype of `result [..., out]`, for `x [..., in]`; dropout 0 means none."""
    in_features, out_features = x.shape[-1], result.shape[-1]
    S2, B2 = flat_bases(A, B, randlora_lambda, randlora_gamma, scaling, in_features, out_features, result.dtype)
    x = F.dropout(x, dropout, training=dropout > 0).to(result.dtype)
    first, second = (S2.T, B2.T) if in_features <= out_features else (B2, S2)
    hidden = x.reshape(-1, in_features) @ first
    # One accumulating product: the sum is rounded once, and no pass over the output is spent on adding.
    return torch.addmm(result.reshape(-1, out_features), hidden, second).view(result.shape)
