"""RandLoRA as functions of tensors, without modules (arXiv 2502.00987; layout in the notes of :func:`flat_bases`)."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import planner
from .bases.patterns import Pattern, made_from_seed
from .ops import calls
from .ops import linear as linear_op
from .ops.fake_kernels import require_one_device
from .ops.linear_call import Fixed, Settings
from .ops.pattern import ListTensors, is_lists, is_seed, is_signs, require_form
from .ops.unique_base import UniqueBaseGrad
from .private_torch import in_transform

__all__ = ["delta_weight", "flat_bases", "linear", "sparse_delta_weight", "unique_base"]


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
    # Both are the same op. The function runs under torch.func too; the op's own autograd costs half its overhead.
    if torch.compiler.is_compiling() or in_transform():
        S: Tensor = UniqueBaseGrad.apply(A, randlora_lambda, randlora_gamma, scale, dtype)
        return S
    return calls.unique_base(A, randlora_lambda, randlora_gamma, scale, dtype)


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
        ValueError: bases too small for the layer, parameters of other sizes, tensors on several devices (such as meta).
        TypeError: what must be a tensor is none.
    """
    _require_tensors(A=A, B=B, randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma)
    require_one_device(A=A, B=B, randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma)
    m, M = _dimensions(in_features, out_features)
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
    device = "cpu" if B2.is_meta else B2.device.type  # there is no autocast for meta
    with torch.autocast(device, enabled=False):  # what is merged must not be rounded to 16 bits on the way
        return B2 @ S2 if in_features <= out_features else S2.T @ B2.T


def sparse_delta_weight(
    pattern: Sequence[Tensor],
    scale: float,
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
    scaling: float,
    in_features: int,
    out_features: int,
) -> Tensor:
    """:func:`delta_weight` from what :meth:`randlora.RandomBases.pattern` gives, with its scale. Differentiable.

    Of Hadamard bases by transforms over the columns, of ternary ones from what is not zero, of a seed through dense
    bases that are made for it.
    """
    _require_tensors(randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma)
    _require_pattern(pattern)
    m, M = _dimensions(in_features, out_features)
    if isinstance(pattern, Pattern):
        pattern.require(randlora_lambda.shape, in_features, out_features)
    if randlora_gamma.dim() != 2 or randlora_gamma.shape[1] != m:
        raise ValueError(
            f"randlora_gamma must have shape [n, m] with m = {m} for a {in_features} -> {out_features} layer, got "
            f"{list(randlora_gamma.shape)}"
        )
    dtype = torch.promote_types(randlora_lambda.dtype, randlora_gamma.dtype)
    if in_transform():  # torch.func and forward mode know the layer op alone
        x = torch.eye(in_features, dtype=dtype, device=randlora_gamma.device)
        with torch.autocast(x.device.type, enabled=False):
            return linear(
                x, None, None, None, None, randlora_lambda, randlora_gamma, scaling * scale, pattern=pattern,
                strategy="materialized", out_features=out_features,
            ).T  # fmt: skip
    if is_seed(pattern):
        r, n = randlora_lambda.shape
        A, B = made_from_seed(pattern, M, m, n, r, dtype)
        return delta_weight(A, B, randlora_lambda, randlora_gamma, scaling * scale, in_features, out_features)
    build = calls.hadamard_update if is_signs(pattern) else calls.sparse_update
    rows = build(pattern, randlora_lambda, randlora_gamma, M, scaling * scale, None, dtype)
    update = rows
    if is_lists(pattern):
        update = rows.new_zeros(m, M).index_copy(0, ListTensors(*pattern).columns.long(), rows)
    return update.T if in_features <= out_features else update


def linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor | None,
    B: Tensor | None,
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
    scaling: float,
    dropout: float = 0.0,
    training: bool = True,
    *,
    strategy: str = "auto",
    out_features: int | None = None,
    weight_is_transposed: bool = False,
    workspace: int = 0,
    seed: Tensor | None = None,
    pattern: Sequence[Tensor] | None = None,
) -> Tensor:
    """``y = x W^T + bias + dropout(x) dW^T``: a linear layer with its RandLoRA update, as one op.

    For backward it keeps `x` as it is (no cast copy) and references to the other tensors; the rest is rebuilt. It can
    be differentiated in `x`, `bias`, `randlora_lambda` and `randlora_gamma`, any number of times, and forward
    (``torch.func.jvp``, ``jacfwd``, ``hessian``) once; a weight that requires a gradient goes through
    ``torch.nn.functional.linear`` beside the op. The result is an ordinary tensor: in-place operations may follow.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]`` (``[in, out]`` with `weight_is_transposed`, as in transformers' ``Conv1D``), or None for
            the update alone, which needs `out_features`.
        bias: ``[out]`` or None.
        A, B, randlora_lambda, randlora_gamma, scaling: as for :func:`flat_bases`.
        dropout: probability, applied to the update's input only while `training`. The mask follows from `seed`
            (``[1]`` int64; default: drawn from torch's generator of x's device) and the element's position; it is drawn
            again in backward, not kept.
        strategy: ``"auto"`` (see :mod:`randlora.planner`), ``"factored"``, ``"materialized"`` or ``"merged"``. Merged
            needs the weight and no dropout; in 16 bits it rounds away updates below half a unit in the last place of W.
        workspace: bytes that temporaries may take, 0 for no limit. Below what a strategy takes at once it works in
            groups of bases: more, smaller products.
        pattern: bases as :meth:`randlora.RandomBases.pattern` gives them, in place of A and B (None), of a
            store that is large enough for the layer. Its tensors are checked once and not to be written to. Lists
            have a factored strategy on the CPU only. Where packed bases are made dense for the call, `workspace` counts
            that; with no limit the CPU does it for some 4 MiB of B at a time (all of it in 16 bits, CUDA always). From
            a seed all of it is made at once with no limit: results are bit for bit those with A and B of this size.

    Returns:
        ``[..., out]`` in the dtype that ``torch.nn.functional.linear`` gives (autocast included); products are in that
        dtype with fp32 accumulation, and the gradient of the scaled base is fp32 until it is reduced.

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    _require_tensors(x=x, randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma)
    _require_numbers(scaling, strategy, out_features, workspace, seed)
    if pattern is not None:
        _require_pattern(pattern)
    if weight is not None:
        out_features = weight.shape[1 if weight_is_transposed else 0] if weight.dim() == 2 else -1
    elif out_features is None:
        raise ValueError("without a weight, out_features must be given")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    return linear_of(
        x, weight, bias, A, B, randlora_lambda, randlora_gamma, scaling, dropout if training else 0.0, compute_dtype(x),
        strategy, out_features, weight_is_transposed, workspace, seed, pattern,
    )  # fmt: skip


def linear_of(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, A: Tensor | None, B: Tensor | None, randlora_lambda: Tensor,
    randlora_gamma: Tensor, scaling: float, p: float, dtype: torch.dtype, strategy: str, out_features: int,
    weight_is_transposed: bool, workspace: int, seed: Tensor | None, pattern: Sequence[Tensor] | None,
) -> Tensor:  # fmt: skip
    """:func:`linear` of arguments whose types are right, as a layer has them; `p` of the dropout that takes place,
    `dtype` by :func:`compute_dtype`.
    """
    shape, sizes = x.shape, randlora_lambda.shape
    if not shape:
        raise ValueError("x must have shape [..., in], got a tensor without dimensions")
    if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"x and weight must have the same dtype, got {x.dtype} and {weight.dtype}")
    in_features = shape[-1]
    if out_features < 1 or in_features < 1 or len(sizes) != 2 or not (sizes[0] and sizes[1]):
        raise ValueError(
            f"x must have shape [..., in], weight two dimensions and randlora_lambda [r, n], none of them 0, got "
            f"{list(shape)}, {out_features if weight is None else list(weight.shape)} and {list(sizes)}"
        )
    if isinstance(pattern, Pattern):
        pattern.require(sizes, in_features, out_features)
    if p == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(0, 2**63 - 1, (1,), device=x.device)
    ordinary, grad = None, torch.is_grad_enabled()
    if weight is not None and weight.requires_grad:
        if grad:
            ordinary = F.linear(x, weight.t() if weight_is_transposed else weight, bias)
            weight = bias = None
        else:
            weight = weight.detach()
    backward_strategy = strategy
    if strategy == "auto":
        traced = torch.compiler.is_compiling() or isinstance(out_features, torch.SymInt)
        plan = planner.plan if traced else planner.remembered_plan
        strategy, backward_strategy = plan(
            int(in_features), out_features, int(sizes[1]), int(sizes[0]), dtype,
            None if weight is None else weight.dtype, x.device.type,
            dropout=p > 0, need_x=grad and x.requires_grad,
            need_parameters=grad and (randlora_lambda.requires_grad or randlora_gamma.requires_grad),
            form=planner.form(pattern),
        )  # fmt: skip
    settings = Settings(out_features, scaling, dtype, strategy, backward_strategy, p, weight_is_transposed, workspace)
    fixed = Fixed(weight, A, B, seed, [*pattern] if pattern else [], settings)
    y = linear_op.apply(x, randlora_lambda, randlora_gamma, bias, fixed)
    return y if ordinary is None else ordinary + y


def _require_tensors(**given: Tensor) -> None:
    for name, t in given.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")


def _require_pattern(pattern: Sequence[Tensor]) -> None:
    if isinstance(pattern, Pattern):
        return
    if not isinstance(pattern, tuple | list) or not all(isinstance(t, Tensor) for t in pattern):
        raise TypeError(f"pattern must be what RandomBases.pattern gives, tensors, got {type(pattern).__name__}")
    require_form(pattern)


def _require_numbers(scaling: object, strategy: object, out_features: object, workspace: Any, seed: object) -> None:
    for name, value, types, what in (
        ("scaling", scaling, (numbers.Real, torch.SymFloat, Tensor), "a number"),
        ("strategy", strategy, str, "a string"),
        ("out_features", out_features, (int, torch.SymInt, type(None)), "an integer"),
        ("workspace", workspace, int, "an integer"),
        ("seed", seed, (Tensor, type(None)), "a tensor [1] of int64"),
    ):
        if not isinstance(value, types):
            raise TypeError(f"{name} must be {what}, got {value!r} ({type(value).__name__})")
    if not 0 <= workspace < 2**63:
        raise ValueError(f"workspace must be 0 (no limit) or a number of bytes, got {workspace}")


def _dimensions(in_features: int, out_features: int) -> tuple[int, int]:
    """The smaller and the larger one."""
    m, M = min(in_features, out_features), max(in_features, out_features)
    if m < 1:
        raise ValueError(f"in_features and out_features must be at least 1, got {in_features} and {out_features}")
    return m, M


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which ``torch.nn.functional.linear`` would compute with `x`: its own, or autocast's."""
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
