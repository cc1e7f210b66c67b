"""A learning rate of its own for gamma is another start of gamma: why there is no setting for one (docs/quality.md)."""

import pytest
import torch
from helpers.common import KINDS, make_bases, normal

import randlora


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", [0.1, 16.0])
def test_a_rate_of_its_own_for_gamma_is_another_start(kind, ratio):
    """Adam moves a number by its rate whatever the gradient's scale: gamma / ratio with s * ratio goes the same way."""
    x, target = normal(24, 33, dtype=torch.float64), normal(24, 20, dtype=torch.float64)

    def trained(gamma_rate, factor):
        torch.manual_seed(0)
        base = torch.nn.Linear(33, 20, dtype=torch.float64)
        bases = make_bases(33, 20, 6, kind=kind)
        layer = randlora.Linear(base, r=6, bases=bases, randlora_alpha=3.0, init_weights=False)
        layer.scaling["default"] *= factor
        lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
        gamma.data.mul_(1 / factor)
        groups = [{"params": [lam], "lr": 0.01}, {"params": [gamma], "lr": gamma_rate}]
        optimizer = torch.optim.Adam(groups, eps=1e-300)
        for _ in range(12):
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        return layer(x), lam, gamma * factor

    for one, other in zip(trained(0.01 * ratio, 1.0), trained(0.01, ratio), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    assert (trained(0.01, 1.0)[0] - trained(0.01 * ratio, 1.0)[0]).abs().max() > 1e-3
