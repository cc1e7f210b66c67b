"""Packed bases of every small size: packed and unpacked again, and as layers."""

import pytest
import torch
from helpers.common import make_layer, normal, reference_forward, reference_update
from torch import nn

import randlora
from randlora.bases import patterns

KINDS = {
    "sign": None,
    "hadamard": None,
    "sparse": None,
    "very_sparse": None,
    "sparse 1.5": 1.5,
    "sparse 2.5": 2.5,
    "very_sparse 10": 10.0,
}
SIZES = range(1, 41)


@pytest.mark.parametrize("planes", [1, 2])
@pytest.mark.parametrize("columns", range(1, 6))
def test_bits_of_every_length_and_layout(columns, planes):
    for length in SIZES:
        block = torch.randint(
            -1, 2, (length, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(length)
        )
        block = block.where(block != 0, 1) if planes == 1 else block
        layouts = (
            block,
            block.t().contiguous().t(),
            block.repeat_interleave(3, 1)[:, ::3],
            block[None].transpose(0, 1)[:, 0],
        )
        words = [patterns._bits(layout, planes) for layout in layouts]
        numbers = (words[0].view(torch.uint8)[..., None] >> torch.arange(8) & 1).flatten(2)[..., :length]
        plus = numbers[:, 0] if planes == 2 else 1 - numbers[:, 0]
        assert torch.equal(plus.to(torch.int8) - numbers[:, -1].to(torch.int8), block.t()), length
        assert words[0].shape == (columns, planes, -(-length // 16))
        assert all(torch.equal(w, words[0]) and w.is_contiguous() for w in words), length


def sizes_of(r):
    """Both orientations of one feature, r and a whole word of bits, and square ones."""
    return sorted({pair for i in SIZES for o in (1, r, 16, i) for pair in ((i, o), (o, i)) if i % 2 or o == 1})


@pytest.mark.parametrize("r", range(1, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_layers_of_every_small_size(kind, r):
    bases = {"kind": kind.split()[0], "sparsity": KINDS[kind], "seed": 1}
    for i, o in sizes_of(r):
        store = randlora.RandomBases(max(i, o), min(i, o), r, **bases)
        layer = make_layer(i, o, r, dtype=torch.float64, bases=store)
        x = normal(2, i, dtype=torch.float64).requires_grad_()
        y = layer(x)
        torch.testing.assert_close(y, reference_forward(layer, x), rtol=1e-9, atol=1e-9, msg=f"{i} -> {o}")
        y.sum().backward()
        expected = (layer.weight + reference_update(layer)).sum(0).expand_as(x)
        torch.testing.assert_close(x.grad, expected, rtol=1e-9, atol=1e-9, msg=f"{i} -> {o}")


@pytest.mark.parametrize("kind", ["sign", "hadamard", "sparse", "very_sparse"])
@pytest.mark.parametrize("shape", [(16, 1), (1, 16), (1, 1), (17, 2)], ids=str)
def test_models_with_a_layer_of_one_feature(kind, shape):
    config = randlora.RandLoraConfig(r=1, kind=kind, target_modules=["0"])
    model = randlora.get_peft_model(nn.Sequential(nn.Linear(*shape)), config)
    model(normal(3, shape[0])).sum().backward()
    with torch.no_grad():
        assert model.eval()(normal(3, shape[0])).isfinite().all()
