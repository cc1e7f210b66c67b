"""Fake kernels: the shapes and dtypes of the ops' results, for torch.compile, torch.export and meta tensors.

PyTorch runs these as soon as one argument is a meta tensor, and answers on the device of whichever argument the result
is made like: an op with one real and one meta argument would return memory that nobody has written to. So all of them
demand that their tensors are on one device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dtypes import at_least_fp32
from .pattern import BitTensors, ListTensors, PlaneTensors, is_bits, is_lists


def require_one_device(**tensors: Tensor | Sequence[Tensor] | None) -> None:
    """Raises ``ValueError``, naming the first argument that is not on the device of the first one."""
    reference: Any
    given: Any
    (first, reference), *_ = tensors.items()
    if not isinstance(reference, Tensor):
        reference, first = reference[0], f"{first}[0]"
    device = reference.device
    for name, given in tensors.items():
        several = not isinstance(given, Tensor) and given is not None
        for i, t in enumerate(given if several else (given,)):
            if t is not None and t.device != device:
                name = f"{name}[{i}]" if several else name
                hint = ""
                if "meta" in (t.device.type, device.type):
                    hint = (
                        ". A meta tensor has a shape and no numbers: load it, or bring an offloaded one back, before "
                        "it is computed with"
                    )
                raise ValueError(f"{name} must be on the device of {first}, {device}, got {t.device}{hint}")


def _gradients(*needed: tuple[Tensor, bool]) -> tuple[Tensor, ...]:
    """One for each tensor, empty where it is not needed."""
    return tuple(like.new_empty(like.shape if need else (0,)) for like, need in needed)


@torch.library.register_fake("randlora::unique_base")
def _(A, randlora_lambda, randlora_gamma, scale=1.0, dtype=None):
    require_one_device(A=A, randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma)
    if dtype is None:
        dtype = torch.promote_types(A.dtype, torch.promote_types(randlora_lambda.dtype, randlora_gamma.dtype))
    return A.new_empty((A.shape[0], randlora_gamma.shape[0], A.shape[2]), dtype=dtype)


@torch.library.register_fake("randlora::unique_base_backward")
def _(grad, A, randlora_lambda, randlora_gamma, scale=1.0, need_lambda=True, need_gamma=True):
    require_one_device(A=A, grad=grad, randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma)
    return _gradients((randlora_lambda, need_lambda), (randlora_gamma, need_gamma))


@torch.library.register_fake("randlora::dropout")
def _(x, seed, p):
    require_one_device(x=x, seed=seed)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("randlora::linear")
def _(x, weight, bias, A, B, randlora_lambda, randlora_gamma, pattern, seed, *, out_features, dtype, **_):
    require_one_device(
        x=x, weight=weight, bias=bias, A=A, B=B, randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma,
        seed=seed, pattern=pattern,
    )  # fmt: skip
    return x.new_empty((*x.shape[:-1], out_features), dtype=dtype)


@torch.library.register_fake("randlora::linear_backward")
def _(grad, x, weight, A, B, randlora_lambda, randlora_gamma, pattern, seed, *, need_x, need_lambda, need_gamma, **_):
    require_one_device(
        x=x, grad=grad, weight=weight, A=A, B=B, randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma,
        seed=seed, pattern=pattern,
    )  # fmt: skip
    return _gradients((x, need_x), (randlora_lambda, need_lambda), (randlora_gamma, need_gamma))


@torch.library.register_fake("randlora::sparse_update")
def _(pattern, randlora_lambda, randlora_gamma, max_dim, scale, weight, dtype):
    require_one_device(randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma, weight=weight, pattern=pattern)
    if weight is not None:
        return torch.empty_like(weight)
    rows = ListTensors(*pattern).columns.numel() if is_lists(pattern) else randlora_gamma.shape[1]
    return randlora_gamma.new_empty((rows, max_dim), dtype=dtype)


@torch.library.register_fake("randlora::sparse_update_backward")
def _(grad, pattern, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma):
    require_one_device(randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma, grad=grad, pattern=pattern)
    return _gradients((randlora_lambda, need_lambda), (randlora_gamma, need_gamma))


@torch.library.register_fake("randlora::packed_expand")
def _(pattern, n, min_dim, max_dim, dtype, first=0, rows=None):
    require_one_device(pattern=pattern)
    if rows is None:
        r = len(BitTensors(*pattern).a_planes) if is_bits(pattern) else len(PlaneTensors(*pattern).a_starts) - 1
        rows = r - first
    A = pattern[0].new_empty((rows, 1, min_dim), dtype=dtype)
    return A, A.new_empty((rows * n, max_dim))


@torch.library.register_fake("randlora::sparse_up_")
@torch.library.register_fake("randlora::sparse_down_")
@torch.library.register_fake("randlora::hadamard_up_")
@torch.library.register_fake("randlora::hadamard_down_")
def _(out, x, pattern, randlora_lambda, randlora_gamma, scale):
    require_one_device(x=x, out=out, randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma, pattern=pattern)


@torch.library.register_fake("randlora::sparse_gradients")
def _(narrow, wide, into_narrow, pattern, randlora_lambda, randlora_gamma, scale):
    return _gradients_of_tokens(narrow, wide, into_narrow, None, pattern, randlora_lambda, randlora_gamma)


@torch.library.register_fake("randlora::hadamard_gradients")
def _(narrow, wide, into_narrow, into_wide, pattern, randlora_lambda, randlora_gamma, scale):
    return _gradients_of_tokens(narrow, wide, into_narrow, into_wide, pattern, randlora_lambda, randlora_gamma)


def _gradients_of_tokens(
    narrow: Tensor,
    wide: Tensor,
    into_narrow: Tensor | None,
    into_wide: Tensor | None,
    pattern: Sequence[Tensor],
    randlora_lambda: Tensor,
    randlora_gamma: Tensor,
) -> tuple[Tensor, ...]:
    require_one_device(
        narrow=narrow, wide=wide, into_narrow=into_narrow, into_wide=into_wide, randlora_lambda=randlora_lambda,
        randlora_gamma=randlora_gamma, pattern=pattern,
    )  # fmt: skip
    dtype = at_least_fp32(narrow.dtype)
    return tuple(like.new_empty(like.shape, dtype=dtype) for like in (randlora_lambda, randlora_gamma))


@torch.library.register_fake("randlora::hadamard_update")
def _(pattern, randlora_lambda, randlora_gamma, max_dim, scale, weight, dtype):
    require_one_device(randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma, weight=weight, pattern=pattern)
    if weight is not None:
        return torch.empty_like(weight)
    return randlora_gamma.new_empty((randlora_gamma.shape[1], max_dim), dtype=dtype)


@torch.library.register_fake("randlora::hadamard_update_backward")
def _(grad, pattern, randlora_lambda, randlora_gamma, scale, need_lambda, need_gamma):
    require_one_device(randlora_lambda=randlora_lambda, randlora_gamma=randlora_gamma, grad=grad, pattern=pattern)
    return _gradients((randlora_lambda, need_lambda), (randlora_gamma, need_gamma))
