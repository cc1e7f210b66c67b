"""What a rank has of a base layer's weight that a parallel plan has cut.

This module imports ``torch.distributed``: it is imported where there is a DTensor.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

if TYPE_CHECKING:
    from ..layers.linear import Linear

Interval = tuple[int, int]  # begin and end


class Share(NamedTuple):
    """`rows` of a weight's outputs and `columns` of its inputs: of one of them this rank's part, of the other all.

    `axis` is the dimension of `mesh` that the weight is cut along, and `dim` the dimension of the weight that is cut;
    None of a weight that every rank has whole.
    """

    mesh: DeviceMesh
    axis: int | None
    dim: int | None
    rows: Interval
    columns: Interval


def share_of(layer: Linear, weight: Tensor) -> Share:
    """What this rank has of the base layer's weight, a DTensor.

    Raises:
        ValueError: a weight that is cut in another way than by whole columns or by whole rows, along one dimension of
            its mesh, or of another shape than was adapted. TypeError: one that is not kept as an ordinary tensor.
    """
    assert isinstance(weight, DTensor)
    shape = (layer.out_features, layer.in_features)
    if layer.fan_in_fan_out or tuple(weight.shape) != shape:
        raise ValueError(
            f"tensor parallel: the base layer must be a torch.nn.Linear with a weight of shape {list(shape)}, the one "
            f"that was adapted, got a {type(layer.get_base_layer()).__name__} with {list(weight.shape)}"
        )
    local = weight.to_local()
    if type(local) not in (Tensor, nn.Parameter) or not local.is_floating_point():
        raise TypeError(
            f"tensor parallel: the base weight's shards must be ordinary tensors of floats, got {type(local).__name__} "
            f"of {local.dtype}"
        )
    return _share(weight.device_mesh, tuple(weight.placements), shape, tuple(local.shape))


def _share(
    mesh: DeviceMesh, placements: tuple[Placement, ...], shape: tuple[int, int], local: tuple[int, ...]
) -> Share:
    cut = [axis for axis, p in enumerate(placements) if not isinstance(p, Replicate) and mesh.size(axis) > 1]
    whole = (0, shape[0]), (0, shape[1])
    place = mesh.get_coordinate()
    if not cut:
        return Share(mesh, None, None, *whole)
    axis = cut[0]
    placement = placements[axis]
    if len(cut) == 1 and type(placement) is Shard and place is not None:
        dim = placement.dim % 2
        size = -(-shape[dim] // mesh.size(axis))  # as torch.chunk cuts
        begin = min(place[axis] * size, shape[dim])
        part = begin, min(begin + size, shape[dim])
        if local == tuple(part[1] - part[0] if d == dim else shape[d] for d in (0, 1)):
            return Share(mesh, axis, dim, *(part if d == dim else whole[d] for d in (0, 1)))
    raise ValueError(
        "tensor parallel: the weight of an adapted layer must be cut by columns, Shard(0), or by rows, Shard(1), along "
        f"one dimension of its mesh and replicated along the others, got {placements} with a local shape of "
        f"{list(local)} for {list(shape)} on {mesh}"
    )
