"""What a layer keeps between forward and backward: its input as it came, and references to what exists anyway."""

import weakref

import pytest
import torch
from helpers.common import make_bases, make_layer, normal, on_devices
from helpers.counted import SavedBytes
from torch import nn

import randlora

D = T = 1024
MIB = 1 << 20


class Block(nn.Module):
    """q, k and v share their input."""

    def __init__(self, make):
        super().__init__()
        self.q, self.k, self.v = make(), make(), make()

    def forward(self, x):
        return self.q(x) + self.k(x) + self.v(x)


@on_devices
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["nodropout", "dropout"])
@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 16 * MIB), (torch.bfloat16, 8 * MIB)], ids=str)
def test_four_blocks_keep_four_inputs(dtype, expected, dropout, device):
    """PEFT: 64 MB in fp32 and 96 MB in bf16 for the same four blocks."""
    bases = randlora.RandomBases(D, D, 32)

    def make():
        base = nn.Linear(D, D, bias=False, dtype=dtype, device=device)
        return randlora.Linear(base, bases=bases, randlora_dropout=dropout)

    blocks = nn.Sequential(*(Block(make) for _ in range(4)))
    x = torch.zeros(T, D, dtype=dtype, device=device, requires_grad=True)
    known = [*blocks.parameters(), *bases.tensors(dtype, x.device)]
    with SavedBytes(known) as saved:
        y = blocks(x)
    assert saved.bytes == expected
    y.sum().backward()


@on_devices
@pytest.mark.parametrize("strategy", ["factored", "materialized", "merged"])
@pytest.mark.parametrize("kind", ["dense", "hadamard"])
@pytest.mark.parametrize("shape", [(64, 96), (96, 64)], ids=str)
def test_every_strategy_keeps_the_input_alone(strategy, kind, shape, device):
    layer = make_layer(*shape, strategy=strategy, device=device, bases=make_bases(*shape, 5, kind=kind))
    x = normal(50, shape[0], device=device).requires_grad_()
    known = [*layer.parameters(), *(layer.pattern("default") or layer.bases["default"].tensors(x.dtype, x.device))]
    with SavedBytes(known) as saved:
        layer(x)
    assert [t.data_ptr() for _, t in saved.storages.values()] == [x.data_ptr()]


@on_devices
@pytest.mark.parametrize("kind", ["dense", "hadamard"])
def test_autocast_keeps_no_cast_copy(kind, device):
    layer = make_layer(64, 96, device=device, bases=make_bases(64, 96, 5, kind=kind))
    x = normal(50, 64, device=device).requires_grad_()
    bases = layer.pattern("default") or layer.bases["default"].tensors(torch.bfloat16, x.device)
    known = [*layer.parameters(), *bases]
    with SavedBytes(known) as saved, torch.autocast(device, torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert [t.data_ptr() for _, t in saved.storages.values()] == [x.data_ptr()]


def test_nothing_is_held_beside_what_hooks_may_take_away():
    """Activations that are offloaded, or computed again in backward, are really gone in between."""
    layer = make_layer(64, 96)
    x = normal(50, 64).requires_grad_()
    hidden = x * 2
    there = weakref.ref(hidden)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = layer(hidden)
    del hidden
    assert there() is None
    y.sum().backward()
    assert x.grad is not None
