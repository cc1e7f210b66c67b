"""Which inputs the adapted layers of a model would get: seen in a call of a copy of the model that has no numbers.

The copy is made of torch's fake tensors: it takes no memory and computes nothing, and neither the model nor any bases
are touched. (On the meta device transformers would look at numbers that are not there.) Used by
:mod:`randlora.estimate`.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..bases.random_bases import RandomBases
from ..distributed.zero3 import shape_of
from ..layers import quantized
from ..layers.experts_form import is_fused_experts
from ..layers.linears import is_ordinary, is_sure_to_be_linear, require_linear
from ..model.adapter_plan import Plan, plan_adapter
from ..model.model import RandLoraModel
from ..model.parts import adapted_layers
from ..private_torch import FakeTensorMode, storage_identity, tree_map


@dataclass(frozen=True)
class Call:
    """One call of an adapted layer in a training step.

    Attributes:
        input: equal for calls that get the same tensor. kept: something else than an adapted layer keeps that tensor
            for backward anyway. need_x: its gradient is needed, too.
    """

    input: int
    kept: bool
    need_x: bool


def trial_call(model: nn.Module, plan: Plan, tokens: int, inputs: Any = None) -> dict[str, list[Call]]:
    """The calls of every slot of `plan`, in a training step of `model` with the adapter on it.

    Args:
        inputs: the model's arguments: a tensor, a tuple, or a dict of keyword arguments. Default: what a model of
            transformers takes; there is none for others.

    Raises:
        Exception: whatever makes this impossible: no `inputs`, a model that cannot be copied, or needs numbers to run.
    """
    arguments = _arguments(model, tokens) if inputs is None else inputs
    with _no_log_of_torch(), FakeTensorMode(allow_non_fake_inputs=True):
        return _call_twin(model, plan, tree_map(lambda v: _fake(v) if isinstance(v, Tensor) else v, arguments))


def _call_twin(model: nn.Module, plan: Plan, arguments: Any) -> dict[str, list[Call]]:
    twin = _without_numbers(model, plan)
    # Layers get the same inputs whatever the bases are: those of this process stay as they are.
    config = replace(plan.config, strategy="auto", inference_mode=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said already, about the model itself
        adapted = RandLoraModel.from_plan(twin, plan_adapter(twin, config, _NoBases(1, 1, config.r))).train()
    with torch.enable_grad(), _watched(adapted_layers(twin)) as calls:
        if isinstance(arguments, Mapping):
            adapted(**arguments)
        else:
            adapted(*(arguments if isinstance(arguments, (tuple, list)) else (arguments,)))
    return calls


class _NoBases(RandomBases):
    def fill(self, out: Tensor, *_: Any) -> Tensor:
        return out


@contextmanager
def _no_log_of_torch() -> Iterator[None]:
    """What cannot be called without numbers is told by the caller, in a line; torch would log a traceback as well."""
    logger = logging.getLogger(FakeTensorMode.__module__)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


class _NoHook:
    no_grad = False

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output


@contextmanager
def _watched(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Fills the dict it gives when the block ends."""
    calls: dict[str, list[Call]] = {}
    seen: list[tuple[str, Tensor]] = []
    elsewhere: list[Tensor] = []
    inside = []

    def enter(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append((name, args[0] if args else next(iter(kwargs.values()))))
            inside.append(name)

        return hook

    def leave(*_: Any) -> None:
        inside.pop()

    def pack(tensor: Tensor) -> Tensor:
        # Without its graph: in a list that the graph's hooks refer to, it would keep all of the graph for ever.
        alone = tensor.detach()
        if not inside:
            elsewhere.append(alone)
        return alone

    handles = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(enter(name), with_kwargs=True))
        handles.append(layer.register_forward_hook(leave))
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield calls
    finally:
        for handle in handles:
            handle.remove()
    # All of these tensors are alive, so no two storages have one address.
    kept = {storage_identity(tensor) for tensor in elsewhere}
    for name, x in seen:
        calls.setdefault(name, []).append(Call(storage_identity(x), storage_identity(x) in kept, x.requires_grad))


class _Stand(nn.Linear):
    """In the place of a layer that fake tensors cannot pass."""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(input)


class _StandOfExperts(nn.Module):
    """In the place of fused experts that stay as they are: which of them a token goes through is in the numbers."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states.clone()


def _without_numbers(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` with fake tensors, in which quantised layers are plain ones of their size."""
    memo: dict[int, Any] = {}
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    for name, module in model.named_modules():
        if is_fused_experts(module) and name not in plan.experts:
            memo[id(module)] = _StandOfExperts()
        if quantized.is_quantized(module) or (is_sure_to_be_linear(module) and not is_ordinary(module)):
            memo[id(module)] = _Stand(*require_linear(module), getattr(module, "bias", None) is not None, dtype=dtype)
        if (hook := vars(module).get("_hf_hook")) is not None:
            memo[id(hook)] = _NoHook()  # accelerate's would bring in, and the copy would take along, its weights
        for value in (*module._parameters.values(), *module._buffers.values(), *vars(module).values()):
            if isinstance(value, nn.Parameter):
                memo[id(value)] = nn.Parameter(_fake(value), value.requires_grad)
            elif isinstance(value, Tensor):
                memo[id(value)] = _fake(value)
    twin = copy.deepcopy(model, memo)
    part: Any
    for part in twin.modules():
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False
    return twin


def _fake(tensor: Tensor) -> Tensor:
    flag = tensor.requires_grad and tensor.is_leaf
    return torch.empty(shape_of(tensor), dtype=tensor.dtype, device="cpu", requires_grad=flag)


def _arguments(model: nn.Module, tokens: int) -> dict[str, Tensor]:
    """Arguments for a model of transformers, `tokens` tokens in all."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    if config is None or main not in ("input_ids", "pixel_values"):
        raise ValueError(f"it is not known how to call a {type(model).__name__}: give its inputs")
    text, image = getattr(config, "text_config", None), getattr(config, "vision_config", None)
    limit = getattr(text or config, "max_position_embeddings", None) or tokens
    limit = max(1, limit - 2)  # RoBERTa counts positions from 2
    length = next(n for n in range(min(limit, tokens), 0, -1) if tokens % n == 0)
    ids = torch.zeros(tokens // length, length, dtype=torch.long)
    arguments = {"input_ids": ids} if main == "input_ids" else {}
    if getattr(config, "is_encoder_decoder", False):
        arguments["decoder_input_ids"] = ids
    if main == "pixel_values" or image is not None:
        image = image or config
        size = image.image_size if isinstance(image.image_size, (tuple, list)) else (image.image_size,) * 2
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        arguments["pixel_values"] = torch.zeros(1, image.num_channels, *size, dtype=dtype)
    return arguments
