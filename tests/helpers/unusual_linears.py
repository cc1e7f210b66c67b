"""Linear layers of classes of users' own, adapted, and the update that their outputs must have."""

import torch
from torch import nn

import randlora
from helpers.common import normal, randomize, reference_update

ON_CPU = {"r": 4, "randlora_alpha": 6}


class Scaled(nn.Linear):
    """As diffusers' LoRACompatibleLinear: one more argument, and another name for the first."""

    def forward(self, hidden_states, scale=1.0, *, shift=0.0):
        return super().forward(hidden_states) * scale + shift


class WithBias(nn.Linear):
    """As Megatron's: gives its bias back beside the product."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight), self.bias


class Plain(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def wrap(base, **settings):
    return randomize(randlora.Linear(base, **ON_CPU | settings))


def make(cls, in_features=12, out_features=7, dtype=torch.float32):
    base = cls(in_features, out_features, dtype=dtype)
    with torch.no_grad():
        base.weight.copy_(normal(out_features, in_features, seed=4))
        base.bias.copy_(normal(out_features, seed=5))
    return base


def update(layer, x, adapter="default"):
    if not isinstance(layer.weight, torch.Tensor):  # of PyTorch's own quantised layers
        return x @ layer.get_delta_weight(adapter).detach().T
    return (x.double() @ reference_update(layer, adapter).T).to(x.dtype)


def both_ways(layer):
    """In training and at inference, where the third call would come from a cache."""
    for training in (True, False):
        layer.train(training)
        for _ in range(3):
            with torch.set_grad_enabled(training):
                yield
