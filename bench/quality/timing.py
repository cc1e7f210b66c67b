"""How long a step of each method takes and how much memory, when it has the machine for itself.

Methods take turns, round after round, so that what disturbs the machine disturbs all of them. The peak is above the
frozen model's weights, of one step with optimizer state and bases: counted by the allocator on CUDA, and on the CPU by
the system, in a process of its own.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bench import measure, methods, peak
from bench.quality.methods import FULL, Method
from bench.quality.tasks import Task
from bench.quality.training import Trainer, moved
from bench.training import storages

if TYPE_CHECKING:
    from bench.quality.workers import Setup

BATCHES = 4
RATE = 1e-5
STEPS = 10_000  # of a schedule that is never followed to its end


def task(task: Task, chosen: dict[str, Method], setup: Setup) -> dict[str, Any]:
    """Method -> columns of its row."""
    device, on_gpu = setup.device, torch.device(setup.device).type == "cuda"
    rounds, calls = (3 if setup.quick else 7), (5 if on_gpu else 1)
    batches = [moved(batch, device) for batch in itertools.islice(task.batches(0), BATCHES)]
    model = task.model(device).requires_grad_(False)
    found: dict[str, dict[str, Any]] = {}
    trainers: dict[str, Trainer] = {}
    for name, method in chosen.items():
        try:
            before = torch.cuda.memory_allocated(device) if on_gpu else 0
            trainers[name] = trainer = _trainer(task, model, method, device)
            for batch in batches:
                trainer.step(batch)
            found[name] = {"trained": trainer.numbers}
            if on_gpu:
                own_weights = sum(storages(model.parameters()).values()) if name == FULL else 0
                found[name]["peak_bytes"] = _peak_cuda(trainer, batches, device) - before - own_weights
        except Exception as problem:
            trainers.pop(name, None)
            found[name] = {"failed": measure.reason(problem)}
    samples: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(rounds):
        for name, trainer in trainers.items():
            samples[name].append(_seconds(trainer, batches, turn, calls, device))
    for name, seconds in samples.items():
        found[name]["ms_per_step"] = f"{1e3 * statistics.median(seconds):.4g}"
    del trainers, model
    gc.collect()
    if not on_gpu:
        for name in samples:
            found[name]["peak_bytes"] = _peak_in_a_process(task.name, name, setup)
    return found


def _trainer(task: Task, model: nn.Module, method: Method, device: str) -> Trainer:
    """On a copy whose frozen weights are those of `model`."""
    torch.manual_seed(0)
    adapted, groups = method.build(methods.twin(model, own_weights=method.name == FULL), task.head, 0)
    return Trainer(task, adapted.to(device), groups, RATE, STEPS, device)


def _seconds(trainer: Trainer, batches: list[Any], turn: int, calls: int, device: str) -> float:
    """Mean of a few steps, the first of a turn untimed where they are short."""
    if calls > 1:
        trainer.step(batches[turn % len(batches)])
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for i in range(calls):
        trainer.step(batches[(turn + i) % len(batches)])
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / calls


# ---- memory ----


def _peak_cuda(trainer: Trainer, batches: list[Any], device: str) -> int:
    torch.cuda.reset_peak_memory_stats(device)
    for batch in batches:
        trainer.step(batch)
    return torch.cuda.max_memory_allocated(device)


def _peak_in_a_process(task_name: str, method_name: str, setup: Setup) -> int | str:
    try:
        return peak.in_a_process(_peak_cpu, task_name, method_name, setup)
    except (MemoryError, RuntimeError):
        return ""


def _peak_cpu(task_name: str, method_name: str, setup: Setup) -> int:
    """What lasts from step to step, by its tensors, and what a further step takes beyond, by the process's own count.

    The first steps have imported, compiled and allocated what is needed once; none of it is counted.
    """
    from bench.quality.methods import methods as known

    setup.apply()
    task, method = setup.task(task_name), known()[method_name]
    batches = list(itertools.islice(task.batches(0), BATCHES))
    model = task.model("cpu").requires_grad_(False)
    weights = storages(model.parameters())
    torch.manual_seed(0)
    adapted, groups = method.build(model, task.head, 0)
    trainer = Trainer(task, adapted, groups, RATE, STEPS, "cpu")
    for batch in batches:
        trainer.step(batch)
    before = peak.start_counting()
    for batch in batches:
        trainer.step(batch)
    above = peak.status_bytes("VmHWM") - before
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    lasting = storages([*trainer.trained, *states, *methods.bases(adapted)])
    return above + sum(size for address, size in lasting.items() if address not in weights)
