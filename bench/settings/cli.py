"""The command line of ``python -m bench settings``."""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import importlib
import multiprocessing
import shlex
import signal
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import ROOT, measure, records
from bench.measure import without
from bench.settings import pictures, selection, table
from bench.settings.book import Book
from bench.settings.points import Column, Point, Runner

STEPS, QUICK_STEPS = 120, 30
PRECISIONS = {"fp32": "highest", "tf32": "high", "bf16": "medium"}  # as torch.set_float32_matmul_precision has them

_runner: Runner | None = None  # of this process


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    book = Book(options)
    columns = selection.columns(options.selection, options.only)
    if not columns:
        raise SystemExit(f"no curve of {options.selection!r} has all of the words {options.only!r}")
    code = 0
    try:
        Measurement(options, book, columns).run()
    except KeyboardInterrupt:
        code = 130
        print("stopped; what has been measured is kept")
    except BrokenProcessPool:
        code = 1
        print(
            "a process ended by force, of too little memory for example (fewer --jobs); what has been measured is kept"
        )
    rows = book.of(columns, options.steps)
    print(table.text(rows))
    print(f"{len(rows)} points in {book.path}")
    for picture in pictures.draw(book.path):
        print(f"drawn: {picture}")
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench settings", description=__doc__)
    parser.add_argument("--selection", choices=list(selection.SELECTIONS), help='which curves (default: "all")')
    parser.add_argument(
        "--only", metavar="WORDS", help='curves with all of these words, such as "rule r=32 language 256"'
    )
    parser.add_argument(
        "--quick", action="store_true", help="minutes on two cores: a tiny model, few curves, few steps"
    )
    parser.add_argument("--seeds", type=int, default=1, help="per point (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"of training a point (default: {STEPS}; quick: {QUICK_STEPS})")
    parser.add_argument("--jobs", type=int, default=1, help="processes that run points at once (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="per process (default: the cores, divided by the jobs)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of products; bf16 is for CPUs that have instructions for it, "
        "and pretrains under autocast (default: fp32, on cuda tf32)",
    )  # fmt: skip
    parser.add_argument("--graphs", action="store_true", help="as of python -m bench quality")
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="default: %(default)s")
    parser.add_argument(
        "--cache", type=Path, default=ROOT / ".gpu" / "quality",
        help="folder for what takes long to make, such as pretrained models (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seconds-limit", type=float, help="no point is begun after this time")
    argv = sys.argv[2:] if argv is None else argv
    options = parser.parse_args(argv)
    options.selection = options.selection or ("quick" if options.quick else "all")
    options.steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    options.threads = options.threads or max(1, torch.get_num_threads() // options.jobs)
    on_gpu = torch.device(options.device).type == "cuda"
    options.precision = options.precision or ("tf32" if on_gpu else "fp32")
    options.command = shlex.join(["python", "-m", "bench", "settings", *without(without(argv, "--results"), "--cache")])
    return options


class Measurement:
    """Which point is next, and who does it. Models are made first, the largest first; points wait for theirs only."""

    def __init__(self, options: argparse.Namespace, book: Book, columns: list[Column]) -> None:
        self.options, self.book, self.columns = options, book, columns
        self.began = time.monotonic()
        self.running: set[Point] = set()
        self.given_up: set[Column] = set()  # a point of it failed
        # Losses by column, exponent of the rate and seed; infinite where a point diverged.
        self.known: dict[Column, dict[int, dict[int, float]]] = {column: {} for column in columns}
        self.fingerprints: dict[tuple[str, int], str] = {}  # of the models that are ready

    def run(self) -> None:
        options = self.options
        arguments = (
            options.device,
            str(options.cache),
            options.quick,
            options.threads,
            options.precision,
            options.graphs,
        )
        if options.jobs == 1:
            begin(*arguments)
            self._fill(Here())
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.jobs, context, initializer=begin_apart, initargs=arguments) as pool:
            try:
                self._fill(pool)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fill(self, pool: Executor) -> None:
        models = sorted({(c.task, c.width) for c in self.columns}, key=lambda model: -model[1])
        doing: dict[Future, Point | tuple[str, int] | None] = {pool.submit(prepare, *model): model for model in models}
        for _ in range(len(models), self.options.jobs):  # the other processes start at once as well
            doing[pool.submit(warm)] = None
        total = len(selection.COARSE) * len(self.columns) * self.options.seeds
        with tqdm(desc="points", unit="point", total=total, disable=None) as bar:
            while True:
                while len(doing) < self.options.jobs + (self.options.jobs > 1) and (point := self.next()) is not None:
                    self.running.add(point)
                    doing[pool.submit(perform, point)] = point
                if not doing:
                    return
                for future in concurrent.futures.wait(doing, return_when="FIRST_COMPLETED").done:
                    self._take(doing.pop(future), future, bar)

    def _take(self, what: Point | tuple[str, int] | None, future: Future, bar: Any) -> None:
        found = future.result()
        if what is None:
            return
        if not isinstance(what, Point):
            if found.get("failed"):
                tqdm.write(f"{what[0]} {what[1]}: {found['failed']}")
            else:
                self._ready(*what, found["fingerprint"])
                seconds = time.monotonic() - self.began
                tqdm.write(f"{what[0]} {what[1] or ''}: ready after {seconds:.0f} s, loss {found['before']:.4f}")
            return
        self.running.discard(what)
        if found.get("failed"):
            self.given_up.add(what.column)
            tqdm.write(f"{what.column}, rate {what.lr:g}: {found['failed']}")
        self.book.put(what, found)
        if (loss := self.book.loss(what, found.get("fingerprint", ""))) is not None:
            self.known[what.column].setdefault(selection.exponent(what.lr), {})[what.seed] = loss
        bar.total = max(bar.total, bar.n + 1)
        bar.update()

    def _ready(self, name: str, width: int, fingerprint: str) -> None:
        self.fingerprints[name, width] = fingerprint
        for column in self.columns:
            if (column.task, column.width) == (name, width):
                for k in selection.EXPONENTS:
                    for seed in range(self.options.seeds):
                        if (loss := self.book.loss(self._point(column, k, seed), fingerprint)) is not None:
                            self.known[column].setdefault(k, {})[seed] = loss

    def next(self) -> Point | None:
        """The first rates of all curves, then what each curve asks for; None if nothing can be begun now."""
        limit = self.options.seconds_limit
        if limit is not None and time.monotonic() - self.began > limit:
            return None
        for coarse in (True, False):
            for column in self.columns:
                if (column.task, column.width) not in self.fingerprints or column in self.given_up:
                    continue
                for point in self._wanted(column, coarse):
                    if point not in self.running:
                        return point
        return None

    def _wanted(self, column: Column, coarse: bool) -> list[Point]:
        seeds, known = range(self.options.seeds), self.known[column]
        means = {k: sum(of.values()) / len(of) for k, of in known.items() if len(of) == len(seeds)}
        asked = [k for k in selection.wanted(means) if not coarse or k in selection.COARSE]
        return [self._point(column, k, seed) for k in asked for seed in seeds if seed not in known.get(k, {})]

    def _point(self, column: Column, k: int, seed: int) -> Point:
        return Point(column, selection.rate(k), seed, self.options.steps)


class Here(Executor):
    """One process, this one: what is submitted is done at once."""

    def submit(self, do: Any, /, *arguments: Any, **named: Any) -> Future:
        future: Future = Future()
        future.set_result(do(*arguments, **named))
        return future


# ---- in the processes ----


def begin_apart(*arguments: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the one that started this decides
    begin(*arguments)


def begin(device: str, cache: str, quick: bool, threads: int, precision: str, graphs: bool) -> None:
    global _runner
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(PRECISIONS[precision])
    _runner = Runner(device, cache, quick, graphs)


def warm() -> None:
    """What takes a process seconds once: imports, and a context on the GPU."""
    for package in ("transformers", "peft", "randlora"):
        with contextlib.suppress(ImportError):  # which the points that need it will say
            importlib.import_module(package)
    torch.zeros(1, device=_runner.device)


def prepare(name: str, width: int) -> dict[str, Any]:
    try:
        found, _, before = _runner.load(name, width)
        return {"before": before, "fingerprint": found.fingerprint}
    except Exception as problem:
        return {"failed": measure.reason(problem)}


def perform(point: Point) -> dict[str, Any]:
    try:
        return _runner.run(point)
    except Exception as problem:
        return {"failed": measure.reason(problem)}
