"""Sums of adapters that are adapters again (PEFT: ``add_weighted_adapter``)."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checks import require_float
from ..config import RandLoraConfig
from ..distributed import zero3
from ..distributed.gathering import whole
from ..layers import offload
from ..layers.attention import MultiheadAttention
from ..layers.randlora_layer import RandLoraLayer
from ..names import plain_name
from .parts import adapted_layers

if TYPE_CHECKING:
    from .adapters import Adapters


def add(model: Adapters, adapters: list[str], weights: list[float], adapter_name: str) -> RandLoraConfig:
    """Add the adapter whose update is ``sum_i weights[i] * dW_i`` to every layer; returns its config."""
    if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
        raise ValueError(f"adapters and weights must be as many, at least one, each once, got {adapters} and {weights}")
    weights = [require_float("weights", weight) for weight in weights]
    configs = [model.peft_config[name] for name in adapters]
    if any(config.modules_to_save or config.bias != "none" for config in configs):
        raise ValueError("adapters with modules_to_save or bias cannot be added up: the sum would not be exact")
    if len(numbers := {config.num_bases for config in configs}) > 1:
        raise ValueError(f"adapters of different num_bases ({', '.join(map(str, numbers))}) cannot be added up")
    layers = adapted_layers(model.model)
    present = {
        path: here
        for path, layer in layers.items()
        if (here := [(n, w) for n, w in zip(adapters, weights, strict=True) if n in layer.randlora_lambda])
    }
    scaling = configs[0].scaling
    if scaling == 0:
        raise ValueError(f"adapter {adapters[0]!r} has randlora_alpha = 0: put another one first")
    _check_bases(layers, present)
    sums = {path: _sum(path, layers[path], here, scaling) for path, here in present.items()}
    for path, (lam, gamma) in sums.items():
        layer, first = layers[path], present[path][0][0]
        layer.update_layer(
            adapter_name, r=layer.r[first], randlora_alpha=configs[0].randlora_alpha, bases=layer.bases[first],
            num_bases=layer.num_bases[first],
        )  # fmt: skip
        with torch.no_grad():
            layer.randlora_lambda[adapter_name].copy_(lam)
            layer.randlora_gamma[adapter_name].copy_(gamma)
    config = copy.deepcopy(configs[0])
    whole = {path: layers[path].num_experts is None for path in sums}
    config.target_modules = list(dict.fromkeys(_target(model.model, path) for path in sums if whole[path]))
    config.target_parameters = [plain_name(path) for path in sums if not whole[path]] or None
    config.randlora_dropout = 0.0
    config.layers_to_transform = config.layers_pattern = config.exclude_modules = None
    return config


def _check_bases(layers: dict[str, RandLoraLayer], present: dict[str, list[tuple[str, float]]]) -> None:
    """One adapter has one pair of bases in all of its layers."""
    every = [(path, name) for path, here in present.items() for name, _ in here]
    first_path, first = every[0]
    for path, name in every:
        if layers[path].bases[name] is not layers[first_path].bases[first]:
            raise ValueError(
                f"{first!r} at {first_path!r} and {name!r} at {path!r} have different bases: their sum is no adapter"
            )


def _sum(path: str, layer: RandLoraLayer, present: list[tuple[str, float]], scaling: float) -> tuple[Tensor, Tensor]:
    """lambda and gamma of the sum, for an adapter of this scaling."""
    real = torch.device("cpu")  # any device that has numbers: those on meta are refused
    with torch.no_grad():
        lambdas, gammas = (
            [whole(offload.trained(parameters, name, part, real)) for name, _ in present]
            for part, parameters in zip(layer.adapter_layer_names, layer.trained_parts(), strict=True)
        )
    for parameter in (*lambdas, *gammas):
        zero3.require_whole(parameter, f"an adapter's parameter at {path!r}", "to add up")
    factors = [weight * layer.scaling[name] / scaling for name, weight in present]
    if all(torch.equal(gamma, gammas[0]) for gamma in gammas):
        return _added(factors, lambdas), gammas[0]
    if all(torch.equal(lam, lambdas[0]) for lam in lambdas):
        return lambdas[0], _added(factors, gammas)
    names = " and ".join(repr(name) for name, _ in present)
    raise ValueError(
        f"at {path!r} neither the gammas nor the lambdas of {names} are equal, so that their sum is no RandLoRA "
        "adapter: activate them together with set_adapter([...]), which adds them up"
    )


def _added(factors: list[float], tensors: list[Tensor]) -> Tensor:
    parts = [factor * tensor for factor, tensor in zip(factors, tensors, strict=True)]
    return sum(parts[1:], start=parts[0])


def _target(model: nn.Module, path: str) -> str:
    """What names this layer in a config: the whole attention for its projections, unless it is the last one alone."""
    parent = path.rpartition(".")[0]
    attention = model.get_submodule(parent)
    whole = isinstance(attention, MultiheadAttention) and attention.projections != ("out_proj",)
    return plain_name(parent if whole else path)
