"""Processes that share the runs: each loads a task once and keeps it.

Many small runs leave most of a GPU idle, one after the other. One process (`jobs` = 1) means this one.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import multiprocessing
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch

from bench import measure
from bench.quality import tasks, training
from bench.quality.methods import methods
from bench.quality.plan import FACTS, Job
from bench.quality.records import TIMING, Facts
from bench.quality.tasks import Task
from bench.quality.tiny import TinyTask

# As torch.set_float32_matmul_precision calls them. "medium" is bfloat16 where a CPU multiplies that, else float32.
PRECISIONS = {"float32": "highest", "tf32": "high", "bf16": "medium"}


@dataclass(frozen=True)
class Setup:
    """What every process needs to know."""

    quick: bool
    cache: str | None
    device: str
    threads: int
    precision: str
    graphs: bool = False

    def apply(self) -> None:
        torch.set_num_threads(self.threads)
        torch.set_float32_matmul_precision(PRECISIONS[self.precision])

    def task(self, name: str) -> Task:
        return TinyTask() if name == TinyTask.name else tasks.task(name, quick=self.quick, cache=self.cache)


class Performer:
    """Does jobs, and keeps the tasks that it has loaded."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.tasks: dict[str, Task] = {}

    def perform(self, job: Job) -> dict[str, Any]:
        """Columns of the row; one that failed says why."""
        try:
            return self._perform(job)
        except Exception as problem:
            found = {"failed": measure.reason(problem)}
        gc.collect()  # now that no traceback holds anything
        if torch.device(self.setup.device).type == "cuda":
            torch.cuda.empty_cache()
        return found

    def _perform(self, job: Job) -> dict[str, Any]:
        if job.task not in self.tasks:
            self.tasks[job.task] = self.setup.task(job.task)
        task = self.tasks[job.task]
        if job.phase == FACTS:
            task.model(self.setup.device)  # what it makes once, it leaves in the cache for the other processes
            return {"facts": Facts.of(task)}
        known = methods()
        if job.phase == TIMING:
            from bench.quality import timing

            return timing.task(task, {name: known[name] for name in job.methods}, self.setup)
        method = known[job.method] if job.method else None
        return training.run(
            task, method, job.phase, job.rate, job.seed or 0, job.steps, self.setup.device, self.setup.graphs
        )


# ---- processes ----


def _work(pipe: connection.Connection, setup: Setup) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that started this decides
    setup.apply()
    if torch.device(setup.device).type == "cuda":  # what takes seconds once, while others load tasks
        for package in ("transformers", "peft", "randlora"):
            with contextlib.suppress(ImportError):
                importlib.import_module(package)
        torch.zeros(1, device=setup.device)
    performer = Performer(setup)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(performer.perform(job))


class Worker:
    def __init__(self, setup: Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, its = context.Pipe()
        self.process = context.Process(target=_work, args=(its, setup))
        self.process.start()
        its.close()
        self.job: Job | None = None

    def begin(self, job: Job) -> None:
        self.job = job
        with contextlib.suppress(BrokenPipeError):  # it has died meanwhile, which is seen when its result is asked for
            self.pipe.send(job)

    def result(self) -> dict[str, Any]:
        return self.pipe.recv()

    def end(self, now: bool = False) -> None:
        """Does not wait for it: :meth:`join` does."""
        if now:
            self.process.terminate()
        self.pipe.close()  # which the process reads as the end

    def join(self) -> None:
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def end(workers: list[Worker], now: bool = False) -> None:
    for worker in workers:
        worker.end(now)
    for worker in workers:
        worker.join()


class Pool:
    """`jobs` processes. Use as a context; leaving it by an exception ends them at once."""

    def __init__(self, setup: Setup, jobs: int) -> None:
        self.setup, self.jobs = setup, jobs
        self.workers: list[Worker] = []
        self.here: Performer | None = None

    def __enter__(self) -> Pool:
        if self.jobs == 1:
            self.setup.apply()
            self.here = Performer(self.setup)
        else:
            self.workers = [Worker(self.setup) for _ in range(self.jobs)]
        return self

    def __exit__(self, kind: Any, *rest: Any) -> None:
        end(self.workers, now=kind is not None)

    def run(self, following: Callable[[], Job | None], take: Callable[[Job, dict[str, Any]], None]) -> None:
        """Jobs of `following` until it has none while none is running; `take` gets what each has found."""
        if self.here is not None:
            while (job := following()) is not None:
                take(job, self.here.perform(job))
            return
        while True:
            for worker in self.workers:
                if worker.job is None:
                    if (job := following()) is None:
                        break
                    worker.begin(job)
            busy = {worker.pipe: worker for worker in self.workers if worker.job is not None}
            if not busy:
                return
            for pipe in connection.wait(busy):
                self._take(busy[pipe], take)

    def _take(self, worker: Worker, take: Callable[[Job, dict[str, Any]], None]) -> None:
        job, worker.job = worker.job, None
        try:
            found = worker.result()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            found = {"failed": f"its process ended with exit code {worker.process.exitcode}"}
            self.workers[self.workers.index(worker)] = Worker(self.setup)
        take(job, found)

    def keep_one(self) -> None:
        """Ends all processes but one, which then has the machine for itself."""
        end(self.workers[1:])
        del self.workers[1:]
