"""Sums of adapters that are adapters again (PEFT: ``add_weighted_adapter``)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .checks import require_float
from .config import RandLoraConfig
from .injection import adapted_layers
from .layer import RandLoraLayer

if TYPE_CHECKING:
    from .model import RandLoraModel


def add(model: RandLoraModel, adapters: list[str], weights: list[float], adapter_name: str) -> RandLoraConfig:
    """Add the adapter whose update is ``sum_i weights[i] * dW_i`` to every layer; returns its config."""
    if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters and weights must be as many, at least one, each once, got {adapters} and {weights}")
    weights = [require_float("weights", weight) for weight in weights]
    configs = [model.peft_config[name] for name in adapters]
    if any(config.modules_to_save for config in configs):
        raise ValueError("adapters with modules_to_save cannot be added up: the sum would not be exact")
    layers = adapted_layers(model.model)
    sums = {}
    for path, layer in layers.items():
        present = [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.randlora_lambda]
        if present:
            sums[path] = present[0][0], *_sum(path, layer, present)
    for path, (first, lam, gamma) in sums.items():
        layer = layers[path]
        layer.update_layer(
            adapter_name, r=layer.r[first], randlora_alpha=layer.randlora_alpha[first], bases=layer.bases[first],
            num_bases=layer.num_bases[first],
        )  # fmt: skip
        with torch.no_grad():
            layer.randlora_lambda[adapter_name].copy_(lam)
            layer.randlora_gamma[adapter_name].copy_(gamma)
    config = copy.deepcopy(configs[0])
    config.target_modules, config.randlora_dropout = list(sums), 0.0
    return config


def _sum(path: str, layer: RandLoraLayer, present: list[tuple[str, float]]) -> tuple[Tensor, Tensor]:
    """lambda and gamma of the sum, in the scaling of the first adapter."""
    first = present[0][0]
    if layer.scaling[first] == 0:
        raise ValueError(f"adapter {first!r} has randlora_alpha = 0: put another one first")
    for name, _ in present[1:]:
        if layer.bases[name] is not layer.bases[first] or layer.num_bases[name] != layer.num_bases[first]:
            raise ValueError(f"{first!r} and {name!r} have different bases at {path!r}: their sum is no adapter")
    lambdas = [layer.randlora_lambda[name].detach() for name, _ in present]
    gammas = [layer.randlora_gamma[name].detach() for name, _ in present]
    factors = [weight * layer.scaling[name] / layer.scaling[first] for name, weight in present]
    if all(torch.equal(gamma, gammas[0]) for gamma in gammas):
        return sum(f * lam for f, lam in zip(factors, lambdas, strict=True)), gammas[0]
    if all(torch.equal(lam, lambdas[0]) for lam in lambdas):
        return lambdas[0], sum(f * gamma for f, gamma in zip(factors, gammas, strict=True))
    names = " and ".join(repr(name) for name, _ in present)
    raise ValueError(
        f"at {path!r} neither the gammas nor the lambdas of {names} are equal, so that their sum is no RandLoRA "
        "adapter: activate them together with set_adapter([...]), which adds them up"
    )
