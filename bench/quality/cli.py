"""What is each method worth? Accuracy, forgetting, trained numbers and seconds on real tasks, tuned alike.

Of each method the learning rate is picked by the loss on validation data, with as many tries for each, and one seed;
with that rate it is trained with several other seeds and looked at on test data. In the end every method is timed
alone. What quality.csv already has for the same data and settings is not run again; Ctrl-C keeps what there is.
"""

from __future__ import annotations

import argparse
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import ROOT
from bench.measure import without
from bench.quality import pictures, records, summary, tasks
from bench.quality.methods import QUICK, TRIES, methods
from bench.quality.plan import Job, Plan
from bench.quality.tiny import TinyTask
from bench.quality.workers import PRECISIONS, Pool, Setup

TASKS = (*tasks.NAMES, *tasks.WIDTHS, TinyTask.name)
QUICK_TASKS = ("tweets",)
QUICK_TRIES, QUICK_SEEDS, SEEDS = 2, 1, 3
TIMING_PART, TIMING_SECONDS = 0.25, 60.0  # of a limited run's time, kept for the timing


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help=f"about ten minutes on two cores: {', '.join(QUICK_TASKS)}, little "
        f"data, {len(QUICK)} methods, {QUICK_TRIES} learning rates, {QUICK_SEEDS} seed")  # fmt: skip
    add("--tasks", metavar="NAME,...", help=f"of {', '.join(tasks.NAMES)} (default: all), language-128, -256 ... for "
        "models of that width, or tiny, to try the script")  # fmt: skip
    add("--methods", metavar="NAME;...", help="or parts of names (default: all)")
    add("--tries", type=int, choices=range(1, TRIES + 1), help=f"learning rates of each method (default: {TRIES})")
    add("--seeds", type=int, help=f"test runs of each method (default: {SEEDS})")
    add("--rate", type=float, help="test at this learning rate, and pick none: what a rate is worth that nobody tuned")
    add("--steps", type=float, default=1.0, metavar="FACTOR", help="of each task's number of steps (default: 1)")
    add("--timing", action="store_true", help="the timing alone")
    add("--no-timing", action="store_true", help="all but the timing")
    add("--seconds-limit", type=float, metavar="SECONDS", help="begin nothing after this time; a quarter of it, a "
        "minute at most, is for the timing")  # fmt: skip
    add("--jobs", type=int, default=1, help="processes at once (default: 1)")
    add("--threads", type=int, help="CPU threads of each process (default: the cores, shared)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--precision", choices=PRECISIONS, help="of products, all else is float32; bf16 is for CPUs that have "
        "instructions for it, and pretrains under autocast (default: float32, on cuda tf32)")  # fmt: skip
    add("--graphs", action="store_true", help="on CUDA, steps as CUDA graphs: sooner, where tests/bench/"
        "test_quality_recorded.py passes")  # fmt: skip
    add("--cache", metavar="FOLDER", default=str(ROOT / ".gpu" / "quality"), help="of data and models, made once "
        "(default: .gpu/quality)")  # fmt: skip
    add("--prepare", metavar="FOLDER", help="make what --cache needs in FOLDER, and end: for a machine without network")
    add("--plan", action="store_true", help="say what would be run, and end")
    add("--no-picture", action="store_true", help="write the CSV alone; `python -m bench plots` draws it later")
    add("--results", type=Path, metavar="FOLDER", default=ROOT / "bench" / "results", help="default: bench/results")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    options.began = time.time()
    options.command = shlex.join(["python", "-m", "bench", "quality", *without(without(argv, "--results"), "--cache")])
    options.tasks = _chosen(parser, "task", options.tasks, ",", TASKS, QUICK_TASKS if options.quick else tasks.NAMES)
    options.methods = _chosen(parser, "method", options.methods, ";", list(methods()), QUICK if options.quick else None)
    options.tries = options.tries or (QUICK_TRIES if options.quick else TRIES)
    if options.seeds is None:
        options.seeds = QUICK_SEEDS if options.quick else SEEDS
    if min(options.seeds, options.jobs) < 1 or not 0 < options.steps < math.inf:
        parser.error("--seeds, --jobs and --steps must be positive")
    if options.rate is not None and not 0 < options.rate < math.inf:
        parser.error(f"--rate must be positive, got {options.rate:g}")
    options.threads = options.threads or max(1, (os.cpu_count() or 1) // options.jobs)
    on_gpu = torch.device(options.device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    options.precision = options.precision or ("tf32" if on_gpu else "float32")
    options.deadline = None
    if options.seconds_limit is not None:
        kept = 0.0 if options.no_timing else min(TIMING_PART * options.seconds_limit, TIMING_SECONDS)
        options.deadline = options.began + options.seconds_limit - kept
    return options


def _chosen(parser: Any, what: str, text: str | None, separator: str, known: Any, default: Any) -> list[str]:
    """In the order of `known`. A part of a name stands for all that have it, a whole name for itself."""
    if text is None:
        return list(default or known)
    parts = [part.strip() for part in text.split(separator) if part.strip()]
    found = [name for name in known if any(part == name or (part not in known and part in name) for part in parts)]
    if missing := [part for part in parts if not any(part in name for name in known)]:
        parser.error(f"there is no {what} {missing[0]!r}; there are: {f'{separator} '.join(known)}")
    return found


# ---- running ----


def run_all(options: argparse.Namespace, plan: Plan, setup: Setup) -> None:
    """Runs, then times. Ctrl-C goes on to the caller."""
    bar = tqdm(total=plan.size(), unit="run", desc="quality", disable=None)

    def following() -> Job | None:
        job = plan.next()
        if job is not None:
            bar.set_postfix_str(str(job))
        return job

    def take(job: Job, values: dict[str, Any]) -> None:
        plan.take(job, values)
        bar.n = plan.ready()
        bar.refresh()
        if plan.problems and "failed" in values:
            tqdm.write(f"  {plan.problems[-1]}")

    with bar, Pool(setup, options.jobs) as pool:
        if options.timing:
            pool.run(iter_jobs([Job(task, "facts") for task in options.tasks]), plan.take)
        else:
            pool.run(following, take)
        if not options.no_timing:
            pool.keep_one()
            bar.set_description("timing")
            pool.run(iter_jobs(plan.timings(), options), plan.take)


def iter_jobs(jobs: Any, options: Any = None) -> Callable[[], Job | None]:
    """`options`: with a limit of time after which there are no more."""
    rest = iter(list(jobs))

    def following() -> Job | None:
        limit = options.seconds_limit if options is not None else None
        if limit is not None and time.time() > options.began + limit:
            return None
        return next(rest, None)

    return following


def show(path: Path, draw: bool) -> None:
    for group in records.load(path).values():
        print(summary.text(summary.summary(group)) + "\n")
    for picture in pictures.draw(path) if draw else ():
        print(f"  {picture}")


def explain(options: argparse.Namespace, plan: Plan, setup: Setup) -> None:
    """What would be run: `--plan`."""
    for name in options.tasks:
        try:
            plan.facts[name] = records.Facts.of(setup.task(name))
        except Exception as problem:
            print(f"{name}: cannot be had: {problem}")
            continue
        steps = plan.steps(name)
        runs = len(plan.methods) * plan.runs_of_method
        print(f"{name}: {runs} runs of {steps} steps ({runs * steps:,}), {plan.facts[name].untuned}, timing")
    print("methods, and the learning rates that are tried:")
    for method in plan.methods.values():
        rates = ", ".join(f"{rate:g}" for rate in plan.rates(method))
        print(f"  {method.name:24} {rates:36} {method.setting}")


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    cache = options.prepare or options.cache
    Path(cache).mkdir(parents=True, exist_ok=True)
    setup = Setup(options.quick, cache, options.device, options.threads, options.precision, options.graphs)
    if options.prepare:
        for name in tqdm(options.tasks, desc="prepare", unit="task", disable=None):
            if name != TinyTask.name:
                tasks.prepare(options.prepare, names=(name,), minilm=not name.startswith("language"))
            tqdm.write(f"  {name}: done")
        return 0
    known = methods()
    chosen = {name: known[name] for name in known if name in options.methods}
    if options.plan:
        explain(options, Plan(options, chosen, None), setup)
        return 0
    if options.quick:
        print(
            "a quick run: little data, few steps, few learning rates and one seed. To be looked at, not to be quoted."
        )
    table = records.Table(options)
    plan = Plan(options, chosen, table)
    stopped = False
    try:
        run_all(options, plan, setup)
    except KeyboardInterrupt:
        stopped = True
        print("stopped; what has been measured is kept")
    show(table.path, not options.no_picture)
    for problem in plan.problems:
        print(problem)
    return 130 if stopped else 1 if plan.problems else 0
