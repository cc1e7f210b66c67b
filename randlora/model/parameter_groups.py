"""What is trained, sorted for an optimizer: lambda and gamma may have learning rates of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..checks import require_float
from ..layers.initial import GAMMA_LR_RATIO

_PARTS = {"randlora_lambda": "lambda", "randlora_gamma": "gamma", "modules_to_save": "other"}


def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    gamma_lr_ratio: float = GAMMA_LR_RATIO,
    weight_decay: float = 0.0,
    adapter_name: str | None = None,
) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch, such as ``torch.optim.AdamW(randlora.parameter_groups(model, lr=1e-3))``.

    Every parameter that requires gradients is in one of them, once, also if several modules share it. To be called when
    the model is on its device and, for FSDP2, sharded; :meth:`randlora.RandLoraModel.set_adapter` decides before what
    is trained.

    Args:
        model: a :class:`randlora.RandLoraModel`, a model of PEFT's with RandLoRA adapters, or any module that holds
            layers such as :class:`randlora.Linear`.
        lr: learning rate of lambda, and of all that is trained beside the adapters.
        gamma_lr_ratio: gamma has `lr` times this. (PEFT's LoRA+ has the like for LoRA's B.)
        weight_decay: of all but gamma. Lambda alone takes the update to zero; with gamma, layers would learn ever more
            slowly.
        adapter_name: leave out what other adapters train.

    Returns:
        Dicts with ``params`` (in the model's order), ``lr``, ``weight_decay`` and ``name``: ``"lambda"``, ``"gamma"``
        and ``"other"`` (``modules_to_save``, biases, heads). Those without parameters are left out.

    Raises:
        TypeError, ValueError: no module, numbers that are no finite ones of at least 0, a model without adapters of
            RandLoRA or without one of this name, no adapter that is trained, parameters on the meta device.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    lr, weight_decay = require_float("lr", lr, 0.0), require_float("weight_decay", weight_decay, 0.0)
    of_group = {"lambda": lr, "gamma": lr * require_float("gamma_lr_ratio", gamma_lr_ratio, 0.0), "other": lr}
    parts = {id(parameter): (group, adapter) for parameter, group, adapter in _parts(model)}
    adapters = dict.fromkeys(adapter for group, adapter in parts.values() if group != "other")
    if not adapters:
        raise ValueError(
            f"this {type(model).__name__} has no adapters of RandLoRA: adapt it by randlora.get_peft_model first"
        )
    if adapter_name is not None and adapter_name not in adapters:
        raise ValueError(f"this model has no adapter named {adapter_name!r}; it has: {', '.join(adapters)}")
    found: dict[str, list[nn.Parameter]] = {group: [] for group in of_group}
    for name, parameter in model.named_parameters():
        group, adapter = parts.get(id(parameter), ("other", None))
        if not parameter.requires_grad or (None not in (adapter, adapter_name) and adapter != adapter_name):
            continue
        if parameter.is_meta:
            raise ValueError(
                f"{name} is on the meta device, and an optimizer would keep that in place of the numbers: call "
                "model.to_empty(device=...) first, or do not offload what is trained"
            )
        found[group].append(parameter)
    if not (found["lambda"] or found["gamma"]):
        raise ValueError(
            f"adapter {adapter_name or ' and '.join(adapters)!r} is not trained: call set_adapter() with its name"
        )
    return [
        {"name": group, "params": parameters, "lr": of_group[group], "weight_decay": weight_decay * (group != "gamma")}
        for group, parameters in found.items()
        if parameters
    ]


def _parts(model: nn.Module) -> Iterator[tuple[nn.Parameter, str, str]]:
    """Parameters of adapters, ours and PEFT's, with their groups and the adapters' names."""
    for module in model.modules():
        for part, group in _PARTS.items():
            held = module._modules.get(part)
            if isinstance(held, nn.ParameterDict):
                yield from ((p, group, adapter) for adapter, p in held._parameters.items() if p is not None)
            elif isinstance(held, nn.ModuleDict):
                for adapter, copied in held.items():
                    yield from ((p, group, adapter) for p in copied.parameters())
