"""PEFT's layers under torch.export, and in-place operations on what they return."""

import pytest
import torch
from helpers.common import make_base, normal
from torch import nn

pytest.importorskip("peft")

from helpers.peft_models import KINDS, Layers, adapt, config

DYNAMIC = {0: torch.export.Dim.DYNAMIC}


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_programs_are_exact(kind, dtype, strict):
    """Whether the layers were called before or not, for the sizes that were seen and for others."""
    model = Layers(a=make_base(130, 300, dtype=dtype), b=make_base(300, 41, dtype=dtype))
    model = adapt(model, config("a", "b", **KINDS[kind])).eval().base_model.model
    for sizes in ((3,), (1, 7, 1000)):
        shapes = None if sizes == (3,) else (DYNAMIC,)
        program = torch.export.export(model, (normal(3, 130, dtype=dtype),), dynamic_shapes=shapes, strict=strict)
        for size in sizes:
            x = normal(size, 130, dtype=dtype)
            assert torch.equal(program.module()(x), model(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_in_place_operations_in_training(kind, leading):
    found = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = adapt(Layers(a=make_base(24, 41), b=make_base(41, 7)), config("a", "b", **KINDS[kind])).train()
        layers = model.base_model.model
        y = layers.b(nn.ReLU(inplace)(layers.a(normal(*leading, 24))))
        (y.div_(3) if inplace else y / 3).sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
