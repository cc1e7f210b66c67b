"""What a model gives with an adapter, and with LoRA in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.randlora_layer import RandLoraLayer
from ..model.adapters import restore
from ..model.model import RandLoraModel
from ..model.parts import adapted_layers
from .source import AdaptedByPeft
from .update import Factors


def check(model: RandLoraModel | AdaptedByPeft) -> None:
    """Raises ``ValueError`` for a model that cannot be called with LoRA in the place of its adapter."""
    if isinstance(model, AdaptedByPeft):
        raise ValueError("inputs: outputs of PEFT's models are not compared: save the adapter and give its folder")
    if merged := [name for name, layer in adapted_layers(model.model).items() if layer.merged]:
        raise ValueError(f"inputs: adapters are merged into {merged[0]!r}: call unmerge_adapter() first")


def compare(
    model: RandLoraModel | AdaptedByPeft,
    adapter: str,
    layers: Mapping[str, RandLoraLayer],
    factors: Mapping[str, Factors],
    inputs: Any,
) -> dict[str, float]:
    """The largest difference of the outputs, the largest output, and how often the largest one is at the same place."""
    assert isinstance(model, RandLoraModel)  # checked
    with _only(model, adapter):
        expected = _output(model, inputs)
        with _in_its_place(layers, factors):
            got = _output(model, inputs)
    if not expected.isfinite().all():
        raise ValueError("inputs: the model's output is not finite on these")
    same = (got.argmax(dim=-1) == expected.argmax(dim=-1)).double().mean()
    return {
        "largest_difference": (got - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
        "same_largest": same.item(),
    }


def _output(model: nn.Module, inputs: Any) -> Tensor:
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        values = found.values() if isinstance(found, Mapping) else found if isinstance(found, (tuple, list)) else ()
        found = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
    if found is None or not found.numel() or not found.dim():
        raise ValueError(f"inputs: the model's output has no logits to compare, it is a {type(output).__name__}")
    numbers: Tensor = found.double()
    return numbers


@contextlib.contextmanager
def _only(model: RandLoraModel, adapter: str) -> Iterator[None]:
    """`model` in eval mode with this adapter alone, and then as it was."""
    active, inference = model.active_adapters, model._inference_mode
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    enabled = model._enabled
    model.eval()
    try:
        if not enabled:
            model.enable_adapter_layers()
        model.set_adapter([adapter], inference_mode=True)
        yield
    finally:
        model.set_adapter(active, inference)
        if not enabled:
            model.disable_adapter_layers()
        restore(flags)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _in_its_place(layers: Mapping[str, RandLoraLayer], factors: Mapping[str, Factors]) -> Iterator[None]:
    """The layers' adapters are switched off, and LoRA's product is added to what they give."""
    layer: Any
    with contextlib.ExitStack() as stack:
        for name, layer in layers.items():
            stack.enter_context(contextlib.closing(_Hook(layer, factors[name])))
        for layer in layers.values():
            layer.enable_adapters(False)
            stack.callback(layer.enable_adapters, True)
        yield


class _Hook:
    def __init__(self, layer: nn.Module, factors: Factors) -> None:
        self._factors = factors
        self._handle = layer.register_forward_hook(self._add, with_kwargs=True)

    def close(self) -> None:
        self._handle.remove()

    def _add(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        x = args[0] if args else kwargs["x"]
        whole = isinstance(output, Tensor)
        y = output if whole else output[0]
        A, B = (tensor.to(y.device, torch.promote_types(torch.float32, y.dtype)) for tensor in self._factors)
        y = (y + F.linear(F.linear(x.to(A), A), B)).to(y.dtype)
        return y if whole else (y, *output[1:])
