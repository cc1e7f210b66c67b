"""A small network of two adapted layers with one store of bases."""

from torch import nn

import randlora
from helpers.common import make_layer


def bases_of(kind, dim=64, r=8):
    # So sparse that the lists are used; the default of such small layers is not.
    return randlora.RandomBases(dim, dim, r, kind=kind, seed=2, sparsity=12.0 if kind == "very_sparse" else None)


def make_network(bases, device="cpu", **arguments):
    """41 -> 64 -> 24, both layers with one store of bases."""
    layers = [make_layer(i, o, 8, device=device, bases=bases, **arguments) for i, o in ((41, 64), (64, 24))]
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def trained(network):
    """Its lambdas and gammas."""
    return [p for p in network.parameters() if p.requires_grad]
