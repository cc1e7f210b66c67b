"""Layers whose weight is cut over ranks compute what one process computes: outputs and all gradients."""

import pytest
import torch
from helpers.common import make_base, normal, randomize
from torch import nn

import randlora

distributed = torch.distributed


def mesh_of(*sizes, names=("tp",)):
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def styles():
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.distributed.tensor import Replicate

    return {
        "columns": ColwiseParallel(output_layouts=Replicate()),
        "rows": RowwiseParallel(input_layouts=Replicate()),
    }, parallelize_module


def run(layer, x, target):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * target).sum().backward()
    of = layer[0]
    return [y.detach(), x.grad, *(p.grad for part in of.trained_parts() for p in part.values())]


def one_layer(into, out, way, bias, kinds, before):
    mesh = mesh_of(distributed.get_world_size())
    plan, parallelize = styles()
    results = []
    for parallel in (False, True):
        model = nn.Sequential(make_base(into, out, bias, torch.float64))
        if parallel and before:
            parallelize(model, mesh, {"0": plan[way]})
        for i, kind in enumerate(kinds):
            M, m = max(into, out), min(into, out)
            bases = randlora.RandomBases(M, m, 4, kind=kind)
            if i == 0:
                model[0] = randlora.Linear(model[0], "0", r=4, randlora_alpha=6, bases=bases)
            else:
                model[0].update_layer(str(i), r=4, randlora_alpha=6, bases=bases)
        model[0].set_adapter([str(i) for i in range(len(kinds))])
        randomize(model[0])
        if parallel and not before:
            parallelize(model, mesh, {"0.base_layer": plan[way]})
        results.append(run(model, normal(2, 3, into, seed=8, dtype=torch.float64), normal(2, 3, out, seed=9, dtype=torch.float64)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("way", ["columns", "rows"])
@pytest.mark.parametrize("into, out", [(12, 40), (40, 12), (16, 16)])
def test_one(two_ranks, into, out, way, before):
    two_ranks(one_layer, into=into, out=out, way=way, bias=True, kinds=["dense"], before=before)
