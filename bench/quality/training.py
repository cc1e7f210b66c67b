"""One run: a method on a task at one learning rate with one seed, trained alike whatever the method.

AdamW without weight decay, warm-up over a tenth of the steps, then linear decay to zero, gradients clipped to norm 1,
the head at a rate of its own (:data:`bench.quality.methods.HEAD_RATE`).
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from bench.quality.methods import Groups, Method
from bench.quality.recorded import Recorded
from bench.quality.tasks import Task

WARM_UP = 0.1
CLIP = 1.0


def batches(task: Task, seed: int, steps: int) -> Iterator[Any]:
    """As many as are wanted; beyond the task's own number in another order."""
    again = (task.batches(seed + 1000 * turn) for turn in itertools.count())
    return itertools.islice(itertools.chain.from_iterable(again), steps)


def moved(batch: Any, device: str) -> Any:
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return tuple(moved(value, device) for value in batch)
    return batch.to(device, non_blocking=True) if isinstance(batch, torch.Tensor) else batch


class Trainer:
    """Optimizer and schedule of one run; :meth:`step` takes a batch.

    `recorded`: on CUDA, steps as graphs (:mod:`bench.quality.recorded`): the same numbers sooner, which is no measure
    of what a step takes its users.
    """

    def __init__(
        self, task: Task, model: nn.Module, groups: Groups, rate: float, steps: int, device: str, recorded: bool = False
    ) -> None:
        self.task, self.model, self.device = task, model, device
        recorded = recorded and torch.device(device).type == "cuda"
        chosen = [
            {"params": group["params"], "lr": group["rate"] if "rate" in group else rate * group["factor"]}
            for group in groups
        ]
        if recorded:  # a graph reads its learning rates, where they are, at each replay
            chosen = [group | {"lr": torch.tensor(group["lr"], device=device)} for group in chosen]
        self.trained = [p for group in groups for p in group["params"]]
        self.optimizer = torch.optim.AdamW(chosen, weight_decay=0.0, fused=True, capturable=recorded)
        warm_up = max(1, round(WARM_UP * steps))

        def part(step: int) -> float:
            return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, part)
        self.record = Recorded(self._compute, self.schedule.step, device) if recorded else None
        model.train()

    @property
    def numbers(self) -> int:
        return sum(p.numel() for p in self.trained)

    def step(self, batch: Any) -> torch.Tensor:
        """The loss, on the device: nothing waits for it."""
        loss = self._compute(moved(batch, self.device))
        self.schedule.step()
        return loss

    def train(self, batches: Iterable[Any]) -> list[torch.Tensor]:
        """Losses of all batches, when the last one is done."""
        if self.record is not None:
            return self.record.run(lambda: (moved(batch, self.device) for batch in batches))
        losses = [self.step(batch) for batch in batches]
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        return losses

    def _compute(self, batch: Any) -> torch.Tensor:
        loss = self.task.loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, CLIP, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def build(task: Task, method: Method, seed: int, device: str) -> tuple[nn.Module, Groups]:
    torch.manual_seed(seed)
    adapted, groups = method.build(task.model(device), task.head, seed)
    return adapted.to(device), groups


def run(
    task: Task,
    method: Method | None,
    phase: str,
    rate: float | None,
    seed: int,
    steps: int,
    device: str,
    recorded: bool = False,
) -> dict:
    """Columns of a row. `method`: None for the model that all start from.

    "pick" gives what a learning rate is picked by, "test" the score on test data and what is kept.
    """
    if method is None:
        return {"trained": 0, **_looked_at(task, task.model(device).to(device), phase)}
    adapted, groups = build(task, method, seed, device)
    trainer = Trainer(task, adapted, groups, rate, steps, device, recorded)
    began = time.perf_counter()
    losses = trainer.train(batches(task, seed, steps))
    seconds = time.perf_counter() - began
    last = torch.stack(losses[-max(1, steps // 10) :]).mean().item()
    row = {"trained": trainer.numbers, "seconds": f"{seconds:.4g}", "training_loss": f"{last:.5g}"}
    return row | _looked_at(task, adapted, phase)


def _looked_at(task: Task, model: nn.Module, phase: str) -> dict[str, str]:
    model.eval()
    if phase == "pick":
        found = {"validation_loss": task.validation_loss(model)}
    else:
        found = {"score": task.score(model, "test"), "kept": task.kept(model)}
    return {name: f"{value:.6g}" for name, value in found.items()}
