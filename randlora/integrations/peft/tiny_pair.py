"""A tiny model, adapted by PEFT's own RandLoRA and by randlora's, and what it means that the two agree."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import peft
import torch
from peft.tuners.randlora import model as peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..peft import switched
from .bases import RANK_AXIS

# float64 throughout: whatever else the user has set, rounding is no difference then.
DTYPE, TOLERANCE = torch.float64, 1e-8
SHAPES = {"up": (5, 11), "down": (11, 4), "square": (4, 4)}  # in, out: each orientation, with sizes of its own
CONFIG = {"r": 3, "randlora_alpha": 5, "target_modules": list(SHAPES), "modules_to_save": ["head"]}


class Differs(Exception):
    """What one comparison has found."""


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(*SHAPES["up"]), nn.Linear(*SHAPES["down"], bias=False)
        self.square, self.head = Conv1D(4, 4), nn.Linear(4, 2)
        fill(self, seed=1)
        self.to(DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.square(self.down(self.up(x).tanh())))


def fill(model: nn.Module, seed: int, part: str = "") -> None:
    """Random numbers for the parameters with `part` in their names, the same for the same names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted((name, p) for name, p in model.named_parameters() if part in name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def inputs(features: int) -> Tensor:
    return torch.randn(3, features, generator=torch.Generator().manual_seed(features), dtype=DTYPE)


class Pair:
    """The same model, adapted by PEFT alone and with randlora enabled."""

    @cached_property
    def prng(self) -> str:
        """How PEFT draws on this machine."""
        drawn = peft_model._kaiming_init((1, 1, 1), torch.Generator().manual_seed(0))
        return "peft-fp16" if drawn.dtype == torch.float16 else "peft"

    def switched(self, on: bool) -> AbstractContextManager:
        return switched(on, self.prng)

    def fresh(self, on: bool, **arguments: Any) -> Any:
        with self.switched(on):
            return peft.get_peft_model(TinyModel(), config(**arguments))

    def trained(self, on: bool, **arguments: Any) -> Any:
        """With random lambda, gamma and head."""
        model = self.fresh(on, **arguments)
        for part in ("randlora_lambda", "randlora_gamma", "modules_to_save"):
            fill(model, seed=2, part=part)
        return model

    @cached_property
    def models(self) -> tuple[Any, Any]:
        """PEFT's and randlora's. Nothing changes them."""
        return self.trained(False), self.trained(True)

    def state_dict(self, on: bool, model: Any = None) -> dict[str, Tensor]:
        with self.switched(on):
            return peft.get_peft_model_state_dict(self.models[on] if model is None else model)


def config(**arguments: Any) -> Any:
    return peft.RandLoraConfig(**{**CONFIG, **arguments})


def layers_of(model: Any) -> dict[str, Any]:
    return {name: model.get_submodule(f"base_model.model.{name}") for name in SHAPES}


def require_same(what: str, theirs: Any, ours: Any) -> None:
    if theirs != ours:
        raise Differs(f"{what}: {theirs} in PEFT, {ours} in randlora")


def require_same_names(what: str, theirs: Iterable[str], ours: Iterable[str]) -> None:
    theirs, ours = list(theirs), list(ours)
    if differing := sorted(set(theirs).symmetric_difference(ours)):
        where = "PEFT" if differing[0] in theirs else "randlora"
        raise Differs(f"{what}: only {where} has {differing[0]}")
    if theirs != ours:
        raise Differs(f"{what}: in another order")


def require_close(what: str, theirs: Tensor, ours: Tensor, tolerance: float = TOLERANCE) -> None:
    require_same(f"shape of {what}", tuple(theirs.shape), tuple(ours.shape))
    scale = theirs.abs().max().double().item() or 1.0
    error = (ours.double() - theirs.double()).abs().max().item() / scale
    if not error <= tolerance:  # NaN is none either
        raise Differs(f"{what}: {error:.1e} apart, relative to the largest number")


def require_all_close(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    require_same_names("names", sorted(theirs), sorted(ours))
    for name in theirs:
        require_close(name, theirs[name], ours[name], tolerance)


def without_bases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith(tuple(RANK_AXIS))}
