"""Adapters to be replaced by others, and the files of those."""

import warnings

import torch

from helpers.common import normal
from helpers.models import adapt, net
from randlora import RandLoraModel


def with_all(seed, dtype=torch.float64, **changes):
    """An adapter with everything that a file can hold: a copy of a module, and biases."""
    model = adapt(net(dtype), seed=seed, **{"modules_to_save": ["head"], "bias": "randlora_only", **changes})
    with torch.no_grad():
        for i, p in enumerate(p for n, p in model.named_parameters() if p.requires_grad and "randlora_" not in n):
            p.add_(normal(*p.shape, seed=50 * seed + i) * 0.3)
    return model


def written(folder, seed=8, make=adapt, **changes):
    model = (make(net(), seed=seed, **changes) if make is adapt else make(seed, **changes)).eval()
    model.save_pretrained(folder)
    return model


def places(model):
    """Which objects there are, and where their numbers are."""
    tensors = [*model.parameters(), *model.buffers()]
    return [id(module) for module in model.modules()], [(id(t), t.data_ptr(), t.requires_grad) for t in tensors]


def load(folder, model=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return RandLoraModel.from_pretrained(net() if model is None else model, folder).eval()
