"""What is run in which order, and which learning rate is picked.

Tasks one after the other, and for each the most telling methods first, from their learning rates to their seeds: a run
that is cut off has whole tables of what it came to. A test begins when its method's learning rates have all been tried;
meanwhile whoever is free goes on with what comes next.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.quality.methods import Method, tried
from bench.quality.records import PICK, TEST, TIMING, Facts, Row, Table

TIER = 6  # methods that are brought to an end before the next ones begin
FACTS = "facts"
Rate = TypeVar("Rate", float, str)
SEED_OF_PICKS = 0  # tests have others: a rate that was lucky with its seed gains nothing by it


@dataclass(frozen=True)
class Job:
    """`phase`: FACTS, PICK, TEST or TIMING. `method`: "" for the baseline. `methods`: those of TIMING."""

    task: str
    phase: str
    method: str = ""
    rate: float | None = None
    seed: int | str = ""
    steps: int = 0
    methods: tuple[str, ...] = ()

    def __str__(self) -> str:
        rate = f" lr={self.rate:g}" if self.rate is not None else ""
        return f"{self.task}: {self.phase} {self.method}{rate}".rstrip()


class Plan:
    """Gives jobs until there are none, and takes what they have found to `table`.

    Attributes:
        facts: of the tasks that have been loaded.
        problems: of tasks that could not be loaded, and of runs that failed.
    """

    def __init__(self, options: Any, methods: dict[str, Method], table: Table | None) -> None:
        self.options, self.methods, self.table = options, methods, table
        self.tasks: list[str] = options.tasks
        self.facts: dict[str, Facts] = {}
        self.problems: list[str] = []
        self.started: set[Job] = set()
        self.finished: set[Job] = set()

    # ---- cases ----

    def case(self, job: Job) -> Row:
        """The columns of a row's key that a job decides."""
        facts = self.facts[job.task]
        method = self.methods.get(job.method)
        return {
            "task": job.task,
            "method": job.method or facts.untuned,
            "setting": method.setting if method else "",
            "phase": job.phase,
            "rate": "" if job.rate is None else f"{job.rate:g}",
            "seed": str(job.seed),
            "steps": str(job.steps),
            "fingerprint": facts.fingerprint,
        }

    def steps(self, task: str) -> int:
        return max(1, round(self.facts[task].steps * self.options.steps))

    def rates(self, method: Method) -> tuple[float, ...]:
        """What is tried; nothing where the rate is given."""
        return () if self.options.rate is not None else tried(method.rates, self.options.tries)

    def picks(self, task: str, method: Method) -> list[Job]:
        steps = self.steps(task)
        return [Job(task, PICK, method.name, rate, SEED_OF_PICKS, steps) for rate in self.rates(method)]

    def tests(self, task: str, method: Method, rate: float | None) -> list[Job]:
        seeds = range(SEED_OF_PICKS + 1, SEED_OF_PICKS + 1 + self.options.seeds)
        return [Job(task, TEST, method.name, rate, seed, self.steps(task)) for seed in seeds]

    def baseline(self, task: str) -> Job:
        return Job(task, TEST, steps=self.steps(task))

    def timings(self) -> Iterator[Job]:
        """One job per task, with the methods that have not been timed."""
        for task in self.facts:
            wanted = [
                name for name in self.methods
                if not self.table.done(self.case(Job(task, TIMING, name, steps=self.steps(task))))
            ]  # fmt: skip
            if wanted:
                yield Job(task, TIMING, steps=self.steps(task), methods=tuple(wanted))

    # ---- picking ----

    def done(self, job: Job) -> bool:
        return job in self.finished or self.table.done(self.case(job))

    def picked(self, task: str, method: Method) -> float | None:
        """The rate of the lowest loss on validation data; None where there is none yet, or none at all."""
        if self.options.rate is not None:
            return self.options.rate
        jobs = self.picks(task, method)
        if not all(self.done(job) for job in jobs):
            return None
        rows = [(job.rate, self.table.get(self.case(job))) for job in jobs]
        losses = {rate: float(row["validation_loss"]) for rate, row in rows if row and row["validation_loss"]}
        return best_rate(losses)

    # ---- order ----

    def order(self, task: str) -> Iterator[Job]:
        """All that a task needs and that could begin, were it not done."""
        yield self.baseline(task)
        listed = list(self.methods.values())
        for first in range(0, len(listed), TIER):
            tier = listed[first : first + TIER]
            for method in tier:
                yield from self.picks(task, method)
            rates = {method.name: self.picked(task, method) for method in tier}
            by_seed = zip(*(self.tests(task, m, rates[m.name]) for m in tier if rates[m.name] is not None), strict=True)
            for jobs in by_seed:
                yield from jobs

    def next(self) -> Job | None:
        """What to begin now; None: nothing can begin, for good if nothing is running either."""
        if self.options.seconds_limit is not None and time.time() > self.options.deadline:
            return None
        for task in self.tasks:
            jobs = self.order(task) if task in self.facts else [Job(task, FACTS)]
            for job in jobs:
                if job not in self.started and not (job.phase != FACTS and self.done(job)):
                    self.started.add(job)
                    return job
        return None

    def take(self, job: Job, values: dict[str, Any]) -> None:
        """What a job has found."""
        self.finished.add(job)
        if job.phase == FACTS:
            if "failed" in values:
                self.problems.append(f"{job.task} cannot be had: {values['failed']}")
            else:
                self.facts[job.task] = values["facts"]
            return
        found = {job.method: values}
        if job.phase == TIMING:
            failed = {"failed": values["failed"]} if isinstance(values.get("failed"), str) else None
            found = {name: failed or values[name] for name in job.methods if failed or name in values}
        for name, columns in found.items():
            one = Job(job.task, job.phase, name, job.rate, job.seed, job.steps)
            self.table.put(self.case(one), self.facts[job.task], columns)
            if columns.get("failed"):
                self.problems.append(f"{one}: {columns['failed']}")

    # ---- how much there is ----

    @property
    def runs_of_method(self) -> int:
        return self.options.seeds + (self.options.tries if self.options.rate is None else 0)

    def size(self) -> int:
        """Runs of all tasks, without the timing."""
        return len(self.tasks) * (1 + len(self.methods) * self.runs_of_method)

    def ready(self) -> int:
        """Runs of known tasks that are done."""
        count = 0
        for task in self.facts:
            listed = [self.baseline(task)]
            for method in self.methods.values():
                listed += self.picks(task, method)
                rate = self.picked(task, method)
                listed += [] if rate is None else self.tests(task, method, rate)
            count += sum(self.done(job) for job in listed)
        return count


def best_rate(losses: dict[Rate, float]) -> Rate | None:
    """Of the lowest loss; what is not finite has diverged. None: all of them."""
    finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return min(finite, key=finite.get) if finite else None


def at_edge(rate: float, rates: Sequence[float]) -> str:
    """Whether the best one might lie beyond what was tried."""
    if len(rates) < 2 or min(rates) < rate < max(rates):
        return ""
    return "lowest tried" if rate == min(rates) else "highest tried"
