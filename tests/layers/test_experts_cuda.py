"""randlora.Experts on a GPU: what it gives on the CPU, unmerged and merged."""

import pytest
import torch
from helpers.common import KINDS
from helpers.experts_cases import adapt, experts_of, families, inputs, parameters_of

pytestmark = pytest.mark.cuda

TOP_K = 2


def computed(family, kind, device):
    """The output, the gradients, and the output of the merged module, which computes by itself."""
    layer = adapt(experts_of(family, torch.float32), kind=kind).to(device)
    hidden, ids, weights = (tensor.detach().to(device) for tensor in inputs(TOP_K, dtype=torch.float32))
    wanted = [hidden.requires_grad_(), weights.requires_grad_(), *parameters_of(layer)]
    y = layer(hidden, ids, weights)
    found = [y, *torch.autograd.grad(y.square().sum(), wanted)]
    for part in layer.adapted():
        part.merge()
    return [*found, layer(hidden, ids, weights)]


@families
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_what_the_cpu_does(family, kind):
    expected, got = (computed(family, kind, device) for device in ("cpu", "cuda"))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4 * a.abs().max().item())
