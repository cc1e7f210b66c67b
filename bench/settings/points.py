"""One point of the measurement: an adapter with its start, trained at one learning rate; and what came out."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.quality import training
from bench.quality.methods import HEAD_RATE, targets, within
from bench.quality.tasks import Task, task

LORA_ALPHA = 16


@dataclass(frozen=True)
class Column:
    """What one curve of loss over learning rate is of.

    Attributes:
        task: "language", or another of :data:`bench.quality.tasks.NAMES`.
        width: of the language model; 0 for tasks that have one model.
        start: "PEFT" (alpha = 20 r, gamma at 1 / max(num_bases, min_dim)), "rule" (:func:`set_start`), or "LoRA" by
            PEFT with alpha = 16, where `kind` is "lora".
        num_bases: 0 for as many as full rank takes.
        gain, gamma: of the rule; 0 with another start.
        gamma_factor: of gamma's learning rate to lambda's.
    """

    task: str
    width: int
    start: str
    kind: str
    r: int
    num_bases: int = 0
    gain: float = 0.0
    gamma: float = 0.0
    gamma_factor: float = 1.0

    def __str__(self) -> str:
        parts = [self.task + (f" {self.width}" if self.width else ""), self.start, self.kind, f"r={self.r}"]
        parts += [f"n={self.num_bases}"] if self.num_bases else []
        parts += [f"G={self.gain:g} g={self.gamma:g}"] if self.start == "rule" else []
        parts += [f"gamma's rate x{self.gamma_factor:g}"] if self.gamma_factor != 1 else []
        return " ".join(parts)


@dataclass(frozen=True)
class Point:
    column: Column
    lr: float
    seed: int
    steps: int


def set_start(model: nn.Module, gain: float, gamma: float, adapter: str = "default") -> float:
    """The rule: ``scaling * gamma_0 * R * sqrt(in / out) = gain`` in every layer, R its number of rank-one terms.

    One scaling serves all layers, and each layer's gamma_0 makes up for its shape; their geometric mean is `gamma`.
    Returns the scaling.
    """
    layers = [layer for layer in model.modules() if adapter in getattr(layer, "randlora_gamma", {})]
    reach = [
        layer.randlora_lambda[adapter].numel() * math.sqrt(layer.in_features / layer.out_features) for layer in layers
    ]
    scaling = gain / (gamma * math.exp(sum(map(math.log, reach)) / len(reach)))
    for layer, terms in zip(layers, reach, strict=True):
        layer.scaling[adapter] = scaling
        layer.randlora_gamma[adapter].data.fill_(gain / (scaling * terms))
    return scaling


def adapted(model: nn.Module, head: list[str], column: Column, seed: int) -> nn.Module:
    """`model` with the column's adapter on all linear layers but the output and the head."""
    if column.start == "LoRA":
        import peft

        config = peft.LoraConfig(
            r=column.r, lora_alpha=LORA_ALPHA, target_modules=targets(model, head), modules_to_save=head or None
        )
        return peft.get_peft_model(model, config)
    import randlora

    config = randlora.RandLoraConfig(
        r=column.r,
        randlora_alpha=20 * column.r,
        kind=column.kind,
        num_bases=column.num_bases or None,
        projection_prng_key=seed,
        target_modules=targets(model, head),
        modules_to_save=head or None,
    )
    wrapped = randlora.get_peft_model(model, config)
    if column.start == "rule":
        set_start(wrapped, column.gain, column.gamma)
    return wrapped


def groups(model: nn.Module, head: list[str], lr: float, gamma_factor: float) -> list[dict[str, Any]]:
    """Parameter groups: lambda (or LoRA's matrices), gamma, and the head."""
    found: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = HEAD_RATE if within(name, head) else lr * gamma_factor if "randlora_gamma" in name else lr
            found.setdefault(rate, []).append(parameter)
    return [{"params": parameters, "rate": rate} for rate, parameters in found.items()]


def rms_of_update(model: nn.Module, adapter: str = "default") -> float:
    """Root of the mean square of dW over all adapted weights."""
    squares, count = 0.0, 0
    with torch.no_grad():
        for layer in model.modules():
            names = getattr(layer, "randlora_gamma", None) or getattr(layer, "lora_A", None) or {}
            if adapter in names and hasattr(layer, "get_delta_weight"):
                update = layer.get_delta_weight(adapter)
                squares += update.double().square().sum()
                count += update.numel()
    return math.sqrt(float(squares) / max(1, count))


class Runner:
    """Runs points; tasks and models are loaded once and kept."""

    def __init__(self, device: str, cache: str | None, quick: bool, graphs: bool = False) -> None:
        self.device, self.cache, self.quick, self.graphs = device, cache, quick, graphs
        self.loaded: dict[tuple[str, int], tuple[Task, nn.Module, float]] = {}

    def load(self, name: str, width: int) -> tuple[Task, nn.Module, float]:
        """The task, its untuned model, and that one's loss on validation data."""
        key = name, width
        if key not in self.loaded:
            if name == "language":
                from bench.quality.tasks import language

                found = language.make(quick=self.quick, cache=self.cache, width=width)
            else:
                found = task(name, quick=self.quick, cache=self.cache)
            model = found.model(self.device)
            self.loaded[key] = found, model, found.validation_loss(model)
        return self.loaded[key]

    def run(self, point: Point) -> dict[str, Any]:
        """Columns of a row. A loss that is not finite is said as it is."""
        column = point.column
        found, untuned, before = self.load(column.task, column.width)
        torch.manual_seed(point.seed)
        model = adapted(copy.deepcopy(untuned), found.head, column, point.seed).to(self.device)
        began = time.perf_counter()
        train(found, model, groups(model, found.head, point.lr, column.gamma_factor), point, self.graphs)
        loss = found.validation_loss(model)
        seconds = time.perf_counter() - began
        score = math.exp(min(loss, 100.0)) if found.metric == "perplexity" else found.score(model, "validation")
        return {
            "loss": f"{loss:.6g}",
            "before": f"{before:.6g}",
            "score": f"{score:.6g}",
            "metric": found.metric,
            "rms_update": f"{rms_of_update(model):.4g}",
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "seconds": f"{seconds:.3g}",
            "fingerprint": found.fingerprint,
        }


def train(found: Task, model: nn.Module, parameter_groups: list[dict[str, Any]], point: Point, graphs: bool) -> None:
    """As :mod:`bench.quality.training` trains."""
    device = str(next(model.parameters()).device)
    trainer = training.Trainer(found, model, parameter_groups, point.lr, point.steps, device, graphs)
    trainer.train(training.batches(found, point.seed, point.steps))
    model.eval()
