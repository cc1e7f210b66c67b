"""``randlora.suggest``: what to set for a model, with what it costs and what was measured."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..bases.definition import KINDS
from ..checks import require_int, require_size
from ..config import RandLoraConfig
from ..estimation.count import Counted
from ..layers.experts_form import is_fused_experts, weight_names
from ..layers.initial import LEARNING_RATE
from ..model.of_config import model_of_config
from . import evidence, text
from .budget import Budget
from .candidates import Candidate, candidates, given_targets, usual_targets
from .choice import choose
from .prices import amount
from .rows import ROWS

USUAL_KINDS, USUAL_RANKS = ("dense", "hadamard", "very_sparse"), (8, 32, 128)


@dataclass(frozen=True)
class Suggestion:
    """The result of :func:`suggest`; ``str()`` is a page of text.

    Attributes:
        config: to be given to :func:`randlora.get_peft_model`, with ``randlora_alpha="auto"``.
        lr: learning rate of AdamW, for all that is trained. alpha: what ``"auto"`` comes to for this model.
        reason: why this one, in a sentence or two. about_lora: what PEFT's LoRA on the same layers is beside it, or "".
        take_lora: whether `about_lora` says that LoRA is the better choice.
        candidate: the one that is suggested, of `candidates`.
        evidence: rows of measured scores about these candidates; empty: nothing was measured.
        budget, tokens, device, dtype: what it was asked for, and what the costs are of. notes: on how they are counted.
    """

    config: RandLoraConfig
    lr: float
    alpha: float
    reason: str
    about_lora: str
    take_lora: bool
    candidate: Candidate = field(repr=False)
    candidates: tuple[Candidate, ...] = field(repr=False)
    evidence: tuple[evidence.Row, ...] = field(repr=False)
    budget: str
    tokens: int
    device: str
    dtype: str
    notes: tuple[str, ...] = field(repr=False)

    def table(self) -> str:
        """The candidates with what each costs, as plain text."""
        return text.table(self.candidates, self.candidate)

    def code(self) -> str:
        """Python to paste: the configuration and an optimizer, for a ``model`` that is there."""
        c = self.candidate
        return text.code(str(c.kind), c.r, c.targets, self.alpha, self.lr)

    def to_dict(self) -> dict[str, Any]:
        """All of it as numbers, strings, lists and dicts, fit for ``json``."""
        return dataclasses.asdict(self) | {"config": self.config.to_dict(), "code": self.code()}

    def __str__(self) -> str:
        c = self.candidate
        parts = [
            self.table(),
            text.wrapped(f"Suggested: {c.method} on {c.targets}. {_sentence(self.reason)}"),
            *([text.wrapped(_sentence(self.about_lora))] if self.about_lora else []),
            self.code(),
            *([text.evidence_table(self.evidence)] if self.evidence else []),
            "\n".join(text.wrapped(note, "- ") for note in self.notes),
        ]
        return "\n\n".join(parts)


def suggest(
    model: nn.Module | str | os.PathLike[str],
    budget: str | None = None,
    *,
    tokens: int = 2048,
    target_modules: list[str] | str | None = None,
    target_parameters: list[str] | None = None,
    kinds: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    inputs: Any = None,
) -> Suggestion:
    """Which kind, rank, alpha, learning rate and layers to take for `model`, from their costs and from measurements.

    Costs are those of :func:`randlora.estimate`; nothing is changed, and no weights are needed. How good a method was
    is looked up in :mod:`randlora.suggestion.evidence`, whose tasks and models are others than yours.

    Args:
        model: a model, which may be on the meta device; or a folder with a ``config.json``, or an id of the Hugging
            Face hub.
        budget: what there is little of. ``"numbers"``: trained ones, and so of the file without its bases.
            ``"bytes"``: memory of training beyond the frozen model. ``"seconds"``: of a step. These take the least
            that is as good. With a limit, ``"numbers=2e6"``, ``"bytes=8GiB"``, or ``"seconds=1.2x"`` (times as long as
            the frozen model's step), all that is within it is weighed alike; as is everything by default.
        tokens: of one step in all, batch times sequence.
        target_modules, target_parameters: as for :class:`randlora.RandLoraConfig`. Default: all linear layers, or
            attention's queries and values.
        kinds, ranks: to choose from. Default: dense, hadamard and very_sparse, with 8, 32 and 128.
        dtype: of the weights of a model that is named; default: what its config says.
        device, autocast, inputs: as for :func:`randlora.estimate`.

    Raises:
        TypeError, ValueError: arguments that do not fit, nothing within the limit, and whatever
            :func:`randlora.get_peft_model` would raise. ImportError: a name, and transformers is not installed.
    """
    wanted = Budget.of(budget)
    tokens = require_int("tokens", tokens, 1)
    kinds = _listed("kinds", kinds, USUAL_KINDS)
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"kinds must be among {', '.join(KINDS)}, got {kind!r}")
    ranks = [require_size("ranks", r) for r in _listed("ranks", ranks, USUAL_RANKS)]
    if isinstance(model, (str, os.PathLike)):
        model = model_of_config(os.fspath(model), dtype)
    elif not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, a folder or an id, got {type(model).__name__}")
    elif dtype is not None:
        raise ValueError(f"dtype is for a model that is named, got a {type(model).__name__} and dtype={dtype}")
    given = target_modules is not None or target_parameters is not None
    groups = [given_targets(model, target_modules, target_parameters)] if given else usual_targets(model)
    found, counted, notes = candidates(
        model, groups, kinds, ranks, ROWS, tokens, device=device, autocast=autocast, inputs=inputs
    )
    choice = choose(found, wanted)
    c = choice.candidate
    assert c.kind is not None and c.alpha is not None
    return Suggestion(
        config=c.targets.config(c.kind, c.r), lr=LEARNING_RATE, alpha=c.alpha, reason=choice.reason,
        about_lora=choice.about_lora, take_lora=choice.take_lora, candidate=c, candidates=tuple(found),
        evidence=tuple(evidence.about([x.method for x in found], ROWS)), budget=str(wanted), tokens=tokens,
        device=str(counted.step.device), dtype=str(counted.step.dtype).removeprefix("torch."),
        notes=tuple(notes + _notes(model, c, tokens, counted, target_parameters)),
    )  # fmt: skip


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def _listed(name: str, values: Sequence[Any] | None, usual: Sequence[Any]) -> list[Any]:
    if values is None:
        return list(usual)
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise ValueError(f"{name} must be a list with at least one to choose from, got {values!r}")
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _notes(
    model: nn.Module, c: Candidate, tokens: int, counted: Counted, parameters: list[str] | None
) -> list[str]:  # fmt: skip
    step = counted.step
    notes = [
        f"costs of a step of {tokens:,} tokens, {str(step.dtype).removeprefix('torch.')} on {step.device}, as randlora "
        "estimate counts them; memory: of training, beyond the frozen model and what it needs itself",
        "step: times as long as the frozen model's, about, from operations and bytes moved; on a GPU with few tokens "
        "all adapters take about the same, and more than this",
        "LoRA: as PEFT computes it",
    ]
    if bases := c.file_bytes - c.file_bytes_without_projections:
        notes.append(f"{amount(bases)} MiB of the file are bases, for PEFT: save_projection=False leaves them out")
    if c.peft_alpha is not None:
        notes.append(
            f"in PEFT's own RandLoraConfig, where gamma starts smaller, randlora_alpha={c.peft_alpha:g} makes the "
            "first step as large; later ones grow faster"
        )
    if parameters is None and (weights := _weights_of_experts(model)):
        notes.append(f"the weights of fused experts stay as they are: target_parameters={weights!r} adapts them")
    return notes


def _weights_of_experts(model: nn.Module) -> list[str]:
    """The endings by which a config names them."""
    found = [(name, weight) for name, m in model.named_modules() if is_fused_experts(m) for weight in weight_names(m)]
    return list(dict.fromkeys(f"{name.rpartition('.')[2]}.{weight}" for name, weight in found))
