"""What :func:`randlora.estimate` knows of a model and a config before it counts any method: the plan and the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ..bases.random_bases import RandomBases
from ..checks import require_dtype, require_int
from ..config import RandLoraConfig
from ..model.adapter_plan import Plan, plan_adapter
from ..model.of_config import first_line
from ..model.parts import adapted_layers
from . import lora, methods
from .step import Beside, Step, beside, layers_of, writes_projections
from .trial_call import Call, trial_call

Calls = Mapping[str, list[Call]]


@dataclass(frozen=True)
class Counted:
    """A training step of a model with the layers that a config adapts. `calls`: of the trial call; empty without."""

    plan: Plan
    step: Step
    others: Beside
    projections: bool
    calls: Calls
    notes: tuple[str, ...]

    def randlora(self, kind: str) -> dict[str, Any]:
        return methods.randlora(self.step, self.plan, kind, self.others, self.projections)

    def lora(self, rank: int | None = None) -> dict[str, Any]:
        """`rank`: default: the one whose number of parameters is nearest."""
        return lora.lora(self.step, self.plan, self.others, rank)


def count(
    model: nn.Module,
    config: RandLoraConfig,
    tokens: int,
    *,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    inputs: Any = None,
    keep_bases: bool = True,
    calls: Calls | None = None,
) -> Counted:
    """Arguments and errors as of :func:`randlora.estimate`. `calls`: of the same layers, from an earlier count."""
    tokens = require_int("tokens", tokens, 1)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if adapted_layers(model):
        raise ValueError("this model is adapted already: estimate takes it as it was before")
    if config.strategy == "merged" and config.randlora_dropout > 0:
        raise ValueError(f"strategy='merged' takes no dropout, got randlora_dropout={config.randlora_dropout}")
    if autocast is not None:
        require_dtype("autocast", autocast)
    # These bases only stand in, so that no others of this process grow.
    plan = plan_adapter(model, config, RandomBases(1, 1, config.r))
    layers = layers_of(model, plan, autocast)

    notes: list[str] = []
    if calls is None:
        try:
            calls = trial_call(model, plan, tokens, inputs)
        except Exception as error:  # whatever a foreign model makes of a call without numbers
            calls, why = {}, first_line(error)
            notes.append(
                f"saved activations are an upper bound, an input of its own for every layer: no trial call ({why})"
            )
        else:
            if missing := [layer.name for layer in layers if layer.name not in calls]:
                more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
                notes.append(
                    f"not called in the trial call, and counted as called once: {', '.join(missing[:3])}{more}"
                )
    called = [replace(layer, calls=calls.get(layer.name)) for layer in layers]
    step = Step(tokens, _device(model, device), called, keep_bases)
    return Counted(plan, step, beside(model, plan), writes_projections(model, plan), calls, tuple(notes))


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        try:
            return torch.device(device)
        except RuntimeError as error:  # torch has no class of its own for it
            raise ValueError(f"device must be one that torch knows, such as 'cpu' or 'cuda', got {device!r}") from error
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if found.type == "meta" else found
