"""What a suggestion chooses from: kinds and ranks on the layers of a model, LoRA beside them, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

from torch import nn

from ..bases.definition import PEFT_KINDS
from ..config import ALL_LINEAR, RandLoraConfig
from ..estimation.count import Counted, count
from ..layers import initial
from ..model.adapter_plan import Plan, filled
from ..model.targets import find_targets, named_targets
from .evidence import LORA, Row, gains
from .step_time import relative_step

LORA_RANKS = (8, 32)
# How models call their projections to queries and values, or the layer that has them.
QUERY_VALUE = (
    ("q_proj", "v_proj"), ("query", "value"), ("q_lin", "v_lin"), ("query_key_value",), ("c_attn",), ("qkv_proj",),
    ("Wqkv",), ("qkv",), ("q", "v"), ("to_q", "to_v"),
)  # fmt: skip


@dataclass(frozen=True)
class Targets:
    """Layers that may be adapted, as a config names them. `few`: not all linear ones, about which evidence is."""

    modules: tuple[str, ...] | str | None
    parameters: tuple[str, ...] | None = None
    few: bool = False

    @classmethod
    def of(cls, modules: list[str] | str | None, parameters: list[str] | None = None) -> Targets:
        """Raises ``TypeError`` or ``ValueError`` as the config does."""
        config = RandLoraConfig(target_modules=modules, target_parameters=parameters)
        named, weights = config.target_modules, config.target_parameters
        return cls(tuple(named) if isinstance(named, list) else named, None if weights is None else tuple(weights))

    def config(self, kind: str, r: int) -> RandLoraConfig:
        modules = list(self.modules) if isinstance(self.modules, tuple) else self.modules
        weights = None if self.parameters is None else list(self.parameters)
        return RandLoraConfig(
            kind=kind, r=r, randlora_alpha=initial.AUTO, target_modules=modules, target_parameters=weights
        )  # fmt: skip

    def __str__(self) -> str:
        modules = "default" if self.modules is None else self.modules
        named = [modules] if isinstance(modules, str) else modules
        return ",".join([*named, *(self.parameters or ())])


@dataclass(frozen=True)
class Candidate:
    """A method on some layers, and its price.

    Attributes:
        method: as in the evidence: ``"hadamard r=32"``, ``"PEFT LoRA r=8"``. kind: None for LoRA.
        targets: the layers. layers: how many these are.
        alpha: what ``randlora_alpha="auto"`` comes to. peft_alpha: that with which PEFT, whose gamma starts at 1 / m,
            takes as large a first step with this kind. None for LoRA, and where PEFT has no such kind.
        trainable_parameters, file_bytes, file_bytes_without_projections: as of :func:`randlora.estimate`.
        memory_bytes: of training beyond the frozen model: bases, saved activations, workspace, trained numbers with
            their gradients and AdamW's moments.
        step: how many times as long as one of the frozen model a step takes, about.
        gains: see :func:`randlora.suggestion.evidence.gains`; empty: not measured, as on few layers.
        gain: their mean; None: not measured.
    """

    method: str
    kind: str | None
    r: int
    targets: Targets
    layers: int
    alpha: float | None
    peft_alpha: float | None
    trainable_parameters: int
    file_bytes: int
    file_bytes_without_projections: int
    memory_bytes: int
    step: float
    gains: tuple[float, ...]
    gain: float | None = field(init=False)  # a field, so that dicts and JSON have it

    def __post_init__(self) -> None:
        object.__setattr__(self, "gain", sum(self.gains) / len(self.gains) if self.gains else None)


def usual_targets(model: nn.Module) -> list[Targets]:
    """All linear layers, and, where their names are known, those that make queries and values in attention.

    Raises:
        ValueError: `model` has no linear layers.
    """
    config = RandLoraConfig(target_modules=ALL_LINEAR)
    named_targets(model, config)  # a model that is one layer is told so
    linear = find_targets(model, config)
    endings = {name.rpartition(".")[2] for name in linear}
    known = [Targets(names, few=True) for names in QUERY_VALUE if endings.issuperset(names) and endings - set(names)]
    return [Targets(ALL_LINEAR), *known[:1]]


def given_targets(model: nn.Module, modules: list[str] | str | None, parameters: list[str] | None) -> Targets:
    """What a user asks for. Raises ``TypeError`` or ``ValueError`` as the config does, and for what is not there."""
    group = Targets.of(modules, parameters)
    config = group.config("dense", 1)
    asked = find_targets(model, filled(config, target_modules=named_targets(model, config)))
    try:
        every = find_targets(model, RandLoraConfig(target_modules=ALL_LINEAR))
    except ValueError:  # it has no linear layers
        every = {}
    return replace(group, few=not every or not every.keys() <= asked.keys())


def candidates(
    model: nn.Module, targets: Sequence[Targets], kinds: Sequence[str], ranks: Sequence[int], rows: Sequence[Row],
    tokens: int, **settings: Any,
) -> tuple[list[Candidate], Counted, list[str]]:  # fmt: skip
    """All of them, for one group of layers after the other; one estimate, for what all share; and notes.

    Ranks above the smaller side of every layer are left out: they cost more and give nothing. `settings`: of
    :func:`randlora.estimation.count.count`.
    """
    found: list[Candidate] = []
    notes: list[str] = []
    for group in targets:
        first = counted = count(model, group.config(kinds[0], min(ranks)), tokens, **settings)
        notes += counted.notes
        largest = max(min(sizes) for sizes in counted.plan.slots.values())
        found += [_of_lora(model, group, counted, rank, rows) for rank in LORA_RANKS if rank <= largest]
        if above := [str(r) for r in ranks if r > largest and r != min(ranks)]:
            notes.append(f"r = {', '.join(above)} left out: no layer of {group} has as many features on both sides")
        for r in ranks:
            if r > largest and r != min(ranks):
                continue
            counted = count(model, group.config(kinds[0], r), tokens, calls=first.calls, **settings)
            found += _of_kinds(model, group, counted, kinds, rows)
    return found, counted, list(dict.fromkeys(notes))


def _of_kinds(
    model: nn.Module, group: Targets, counted: Counted, kinds: Sequence[str], rows: Sequence[Row]
) -> Iterator[Candidate]:
    r = counted.plan.config.r
    for kind in kinds:
        values, method = counted.randlora(kind), f"{kind} r={r}"
        step = relative_step(model, counted, kind, values["multiply_adds"])
        yield _candidate(method, kind, r, group, counted, values, step, gains(method, rows))


def _of_lora(model: nn.Module, group: Targets, counted: Counted, rank: int, rows: Sequence[Row]) -> Candidate:
    values, method = counted.lora(rank), f"{LORA} r={rank}"
    step = relative_step(model, counted, "lora", values["multiply_adds"])
    return _candidate(method, None, rank, group, counted, values, step, gains(method, rows))


def _candidate(
    method: str, kind: str | None, r: int, group: Targets, counted: Counted, values: dict[str, Any], step: float,
    measured: tuple[float, ...],
) -> Candidate:  # fmt: skip
    # The trained numbers and their gradients take as much as AdamW's two moments of them.
    memory = ("bases_bytes", "saved_bytes", "workspace_bytes", "optimizer_bytes", "optimizer_bytes")
    return Candidate(
        method=method, kind=kind, r=r, targets=group, layers=len(counted.plan.slots),
        alpha=None if kind is None else cast(float, counted.plan.config.randlora_alpha),
        peft_alpha=_peft_alpha(counted.plan) if kind in PEFT_KINDS else None,
        trainable_parameters=values["trainable_parameters"], file_bytes=values["file_bytes"],
        file_bytes_without_projections=values["file_bytes_without_projections"],
        memory_bytes=sum(values[name] for name in memory), step=step, gains=() if group.few else measured,
    )  # fmt: skip


def _peft_alpha(plan: Plan) -> float:
    """The geometric mean over layers, to three digits."""
    alpha, r = cast(float, plan.config.randlora_alpha), plan.config.r
    logs = []
    for slot, sizes in plan.slots.items():
        shape = initial.Shape(*sizes, plan.num_bases(slot))
        _, ours = initial.start(initial.ByRule(alpha), r, shape)
        _, peft = initial.start(alpha, r, shape)
        logs.append(math.log(ours / peft))
    return float(f"{alpha * math.exp(math.fsum(logs) / len(logs)):.3g}")
