"""Layers that are cut over ranks, beside the same layers alone; for functions that run on ranks."""

import torch
from torch import nn

import randlora
from helpers.common import make_base, normal, randomize


def mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))


def parallelize(model, way, name, whole=True):
    """`whole`: inputs and outputs of the layer are ordinary tensors, the same on every rank. Otherwise the side of the
    layer that is cut comes or goes in parts, the output as a DTensor.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if way == "columns":
        style = ColwiseParallel(output_layouts=Replicate() if whole else Shard(-1), use_local_output=whole)
    else:
        style = RowwiseParallel(input_layouts=Replicate() if whole else Shard(-1))
    parallelize_module(model, mesh(), {name: style})


def bases(into, out, r, kind="dense", n=None, **arguments):
    """A store that is larger than the layer needs, or tensors of one kind."""
    M, m = max(into, out), min(into, out)
    if kind == "given":
        A, B = normal(r, 1, m + 2, seed=5), normal(M + 3, (n or -(-m // r)) + 1, r, seed=6)
        return randlora.RandomBases.from_tensors(A.double(), B.double())
    return randlora.RandomBases(M + 1, m + 1, r, kind=kind, num_bases=n, seed=2**63 + 7, **arguments)


def adapted(into, out, way=None, before=True, bias=True, r=3, kinds=("dense",), n=None, whole=True, **options):
    """A layer alone in a model, with an adapter of each kind, all active; `way`: cut over the ranks, before or after it
    is adapted. `whole`: as for :func:`parallelize`.
    """
    model = nn.Sequential(make_base(into, out, bias, torch.float64))
    if way and before:
        parallelize(model, way, "0", whole)
    for i, kind in enumerate(kinds):
        settings = {"r": r, "randlora_alpha": 6.0, "num_bases": n, **options}
        store = bases(into, out, r, n=n, **(kind if isinstance(kind, dict) else {"kind": kind}))
        if i:
            settings.pop("strategy", None)
            model[0].update_layer(str(i), bases=store, **settings)
        else:
            model[0] = randlora.Linear(model[0], "0", bases=store, **settings)
    model[0].set_adapter([str(i) for i in range(len(kinds))])
    randomize(model[0])
    if way and not before:
        parallelize(model, way, "0.base_layer", whole)
    return model


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def call(model, tokens=(2, 3), seed=8, through=None, in_parts=False):
    """Output, and the gradients of x and of all that is trained; `through`: what to call in the model's place.

    `in_parts`: every rank gives the layer its columns of x.
    """
    layer = model[0]
    layer.zero_grad()
    x = normal(*tokens, layer.in_features, seed=seed, dtype=torch.float64)
    if in_parts:
        from torch.distributed.tensor import Shard, distribute_tensor

        x = distribute_tensor(x, mesh(), [Shard(-1)])
    y = whole((through or model)(x.requires_grad_()))
    (y * normal(*tokens, layer.out_features, seed=seed + 1, dtype=torch.float64)).sum().backward()
    return [y.detach(), whole(x.grad), *(p.grad for part in layer.trained_parts() for p in part.values())]


def assert_equal(expected, got):
    for e, g in zip(expected, got, strict=True):
        if e is None or g is None:
            assert e is g
        else:
            torch.testing.assert_close(g, e, rtol=1e-11, atol=1e-11)


def same_as_alone(cases):
    for case in cases:
        way, tokens, whole = case.pop("way"), case.pop("tokens", (2, 3)), case.pop("whole", True)
        in_parts = not whole and way == "rows"
        try:
            parallel = call(adapted(way=way, whole=whole, **case), tokens, in_parts=in_parts)
            assert_equal(call(adapted(**case), tokens), parallel)
        except Exception as error:
            raise AssertionError(f"{way}, {whole=}, {case}") from error
