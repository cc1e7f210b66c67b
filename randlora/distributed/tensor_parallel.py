"""Tensor parallel: adapted layers whose weight is a DTensor, cut by columns or by rows over the ranks of a mesh.

``torch.distributed.tensor.parallel.parallelize_module`` and transformers' own plans make a layer's weight a DTensor and
bring its input and output into the layouts that the plan asks for, before and after the product. The update is added in
between, right at the product (:class:`_InPlaceOfLinear`), so that activations are sent and summed once for both:

    by columns   weight Shard(0), x Replicate, its gradient Partial     y Shard(-1)
    by rows      weight Shard(1), x Shard(-1)                           y Partial

lambda and gamma are whole on every rank. What a rank computes for them is a part of their gradients, and the parts are
summed: all that is sent for an adapter. Bases never travel. A rank makes the rows of B and the columns of A that its
shard needs (:mod:`randlora.bases.parts`). Where the bases are used through transforms or lists, Hadamard ones and very
sparse ones on the CPU, each rank computes the whole update of its tokens and keeps its part.

This module imports ``torch.distributed``: it is imported where there is a DTensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.overrides import TorchFunctionMode

from .. import planner
from ..bases import parts
from ..bases.copies import canonical
from ..dtypes import at_least_fp32
from ..functional import compute_dtype, linear_of
from ..layers.mixed_batch import add_updates
from .parallelized import distributed_weight
from .shard_update import ShardCall, shard_matrix, shard_update
from .share import Share, share_of

if TYPE_CHECKING:
    from ..layers.linear import Linear

# ---- a call ----


def forward(layer: Linear, x: Tensor, adapters: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
    """The base layer's output with the updates of `adapters`, or of every sample's own in a mixed batch.

    What `x` and the result are, tensors or DTensors, and in which layout, is the parallel plan's affair.

    Raises:
        ValueError, TypeError: as :func:`share_of`; lambda or gamma that are DTensors themselves; a base layer that does
            not compute its product by ``torch.nn.functional.linear``.
    """
    base = layer.get_base_layer()
    between_calls = distributed_weight(base)
    assert between_calls is not None
    products: list[None] = []

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        products.append(None)
        x = input
        # A DTensor may be another one than between calls: fully_shard puts it together along its dimension of the mesh.
        # An ordinary weight is whole if fully_shard is alone, or a shard, with which transformers computes in no_grad.
        if not isinstance(weight, DTensor) and weight.shape == (layer.out_features, layer.in_features):
            dtype = compute_dtype(x)
            update = _of_all(
                layer, x, adapters, lambda x, name: layer._update(x, dtype, name, None, None), layer.out_features
            )
            return F.linear(x, weight, bias) + update
        share = share_of(layer, weight if isinstance(weight, DTensor) else between_calls)
        product = F.linear(x, weight, bias)
        if not isinstance(x, DTensor):
            return product + _update(layer, share, x, _layout(share, (Replicate(),) * share.mesh.ndim, 0), adapters)
        layout = _layout(share, x.placements, x.dim())
        if x.placements != layout.x:
            x = x.redistribute(placements=layout.x)
        update = _update(layer, share, x.to_local(grad_placements=layout.x_gradient), layout, adapters)
        shape = torch.Size((*x.shape[:-1], layer.out_features))
        stride = torch.empty(shape, device="meta").stride()
        update = update.to(product.dtype)
        return product + DTensor.from_local(update, share.mesh, layout.y, run_check=False, shape=shape, stride=stride)

    with _InPlaceOfLinear(linear):
        result: Tensor = base(x, *args, **kwargs)
    if len(products) != 1:
        raise TypeError(
            "tensor parallel: an update can only be added to one product by torch.nn.functional.linear, and the base "
            f"layer, a {type(base).__name__}, computed {len(products)} of them"
        )
    return result


class _InPlaceOfLinear(TorchFunctionMode):
    """While this lasts, another function is called in the place of ``F.linear``.

    A base layer is brought its input, and has its output reduced, by hooks of its own (``parallelize_module``) or by a
    forward that stands around its own (transformers). Here is in between for both.
    """

    def __init__(self, linear: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear = linear

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (self.linear if func is F.linear else func)(*args, **(kwargs or {}))


class _Layout(NamedTuple):
    """How a call's tensors lie on the mesh, and the dimensions along which ranks have parts of lambda's gradient."""

    x: tuple[Placement, ...]
    x_gradient: tuple[Placement, ...]
    y: tuple[Placement, ...]
    partial: list[int]


def _layout(share: Share, of_x: Sequence[Placement], dims: int) -> _Layout:
    """For an input of `dims` dimensions that comes as `of_x`."""
    last = Shard(dims - 1)
    ways: list[tuple[Placement, Placement, Placement]] = []
    partial = []
    for axis, placement in enumerate(of_x):
        if axis == share.axis:
            ways.append((Replicate(), Partial(), last) if share.dim == 0 else (last, last, Partial()))
            partial.append(axis)
        elif type(placement) is Shard and placement.dim % dims != dims - 1:  # of the tokens
            ways.append((placement, placement, placement))
            partial.append(axis)
        else:
            ways.append((Replicate(), Replicate(), Replicate()))
    x, x_gradient, y = zip(*ways, strict=True)
    return _Layout(x, x_gradient, y, partial)


# ---- the update of this rank's part ----


def _update(layer: Linear, share: Share, x: Tensor, layout: _Layout, adapters: Sequence[str]) -> Tensor:
    """``[..., rows of the share]`` from x ``[..., columns of the share]``; a part of a sum where the weight is cut by
    rows.
    """
    update = functools.partial(_update_of, layer, share, layout)
    return _of_all(layer, x, adapters, update, share.rows[1] - share.rows[0])


def _of_all(
    layer: Linear, x: Tensor, adapters: Sequence[str], update: Callable[[Tensor, str], Tensor], out: int
) -> Tensor:
    """The sum of ``update(x, name)``, ``[..., out]``, over `adapters`; in a mixed batch of every sample's own."""
    if layer.mixed_batch is None or layer.disable_adapters:
        return functools.reduce(torch.add, (update(x, name) for name in adapters))
    nothing = x.new_zeros((*x.shape[:-1], out), dtype=compute_dtype(x))
    return add_updates(layer.mixed_batch, x, nothing, adapters, update)


def _update_of(layer: Linear, share: Share, layout: _Layout, x: Tensor, adapter: str) -> Tensor:
    groups = [share.mesh.get_group(axis) for axis in layout.partial]
    lam, gamma = _with_summed_gradients(*_trained(layer, adapter, x.device), groups)
    p = layer.dropout_of(adapter)
    seed = _seed(share.mesh, layout, x.device) if p else None
    dtype, strategy = compute_dtype(x), planner.without_weight(layer.strategy)
    bases = layer._bases(adapter)
    whole = None if parts.is_cut(bases, x.device) else layer._pattern(adapter, x.device)
    if whole is None:
        part, call = _part(layer, share, adapter, dtype, x.device)
        call = call._replace(strategy=strategy, dropout=p, seed=seed)
        columns = gamma[:, part.column : part.stop]
        if bases.keep:
            return shard_update(x, lam, columns, bases.part(part), call)
        draw = functools.partial(bases.draw_part, part)
        return shard_update(x, lam, columns, (None, None), call._replace(draw=draw))
    pattern, factor = whole
    y = linear_of(
        F.pad(x, (share.columns[0], layer.in_features - share.columns[1])), None, None, None, None, lam, gamma,
        layer.scaling[adapter] * factor, p, dtype, strategy, layer.out_features, False, layer.workspace, seed, pattern,
    )  # fmt: skip
    return y[..., slice(*share.rows)]


def _part(
    layer: Linear, share: Share, adapter: str, dtype: torch.dtype, device: torch.device
) -> tuple[parts.Part, ShardCall]:
    """What the share needs of an adapter's bases, and a call that computes with it."""
    of_inputs = layer.in_features <= layer.out_features
    rows, columns = (share.rows, share.columns) if of_inputs else (share.columns, share.rows)
    r, n = layer.r[adapter], layer.num_bases[adapter]
    scale = layer.scaling[adapter] * layer._bases(adapter).scale
    call = ShardCall(columns[1] - columns[0], rows[1] - rows[0], r, n, scale, of_inputs, dtype, "auto")
    return parts.Part(*rows, *columns, n, dtype, canonical(device)), call


def _trained(layer: Linear, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
    lam, gamma = layer._trained(adapter, device)
    if isinstance(lam, DTensor) or isinstance(gamma, DTensor):
        raise ValueError(
            f"tensor parallel: lambda and gamma of {adapter!r} must be ordinary tensors, whole on every rank, got "
            "DTensors: leave them out of the parallel plan"
        )
    return lam, gamma


def _seed(mesh: DeviceMesh, layout: _Layout, device: torch.device) -> Tensor:
    """Of a dropout mask: one for ranks with the same input, another one for each of those that have parts of it."""
    seed = torch.randint(0, 2**62, (1,), device=device)
    place = mesh.get_coordinate()
    assert place is not None
    for axis, placement in enumerate(layout.x):
        if isinstance(placement, Replicate):  # that of the first; torch.compile traces a sum, but no broadcast
            seed = seed if place[axis] == 0 else torch.zeros_like(seed)
            dist.all_reduce(seed, group=mesh.get_group(axis))
    part = 0
    for axis, placement in enumerate(layout.x):
        if not isinstance(placement, Replicate):
            part = part * mesh.size(axis) + place[axis]
    return seed + part


# ---- gradients ----


def _with_summed_gradients(lam: Tensor, gamma: Tensor, groups: list[Any]) -> tuple[Tensor, Tensor]:
    """The same tensors; their gradients are summed over each of `groups`, in one message for both."""
    if not groups or not torch.is_grad_enabled() or not (lam.requires_grad or gamma.requires_grad):
        return lam, gamma
    lam, gamma = _SummedGradients.apply(lam, gamma, groups)
    return lam, gamma


class _SummedGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, lam: Tensor, gamma: Tensor, groups: list[Any]) -> tuple[Tensor, Tensor]:
        ctx.groups = groups
        return lam.view_as(lam), gamma.view_as(gamma)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [grad for grad, need in zip(grads, ctx.needs_input_grad, strict=False) if need]
        flat = torch.cat([grad.reshape(-1) for grad in wanted])
        for group in ctx.groups:
            dist.all_reduce(flat, group=group)
        sums = flat.split([grad.numel() for grad in wanted])
        found = iter([total.view_as(grad).to(grad.dtype) for total, grad in zip(sums, wanted, strict=True)])
        return *(next(found) if need else None for need in ctx.needs_input_grad[:2]), None


# ---- merging ----


def delta_like(layer: Linear, adapter: str, weight: Tensor) -> Tensor:
    """``dW`` of an adapter as a DTensor that is cut as the weight is; every rank makes its own part. fp32 or fp64."""
    assert isinstance(weight, DTensor)
    share, device = share_of(layer, weight), weight.to_local().device
    bases = layer._bases(adapter)
    if parts.is_cut(bases, device):
        lam, gamma = _trained(layer, adapter, device)
        dtype = at_least_fp32(lam.dtype)
        part, call = _part(layer, share, adapter, dtype, device)
        drawn = bases.draw_part(part)  # a matrix is built once in a while: nothing of them need stay
        local = shard_matrix(lam, gamma[:, part.column : part.stop], drawn, call)
    else:
        local = layer.get_delta_weight(adapter).to(device)[slice(*share.rows), slice(*share.columns)].contiguous()
    return DTensor.from_local(
        local, share.mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )
