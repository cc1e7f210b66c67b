"""How everything in bench/ is timed, so that two numbers from it can be compared.

Providers (ways to compute the same thing) take turns in random order, round after round: what disturbs the machine
meanwhile disturbs all of them. A turn is as many calls as make up 10 ms, and its mean is one sample; where that is more
than one call, an untimed one goes before. Reported are the median and the 20% and 80% quantiles of the samples, and the
ratio of the baseline's median to the provider's. Every provider's result is checked before anything is timed.
CPU: ``perf_counter``. CUDA: events, with the L2 cache flushed before every call. Freeing a result is not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import ROOT

TURN_SECONDS = 0.01
MAX_ROUNDS = 101


@dataclasses.dataclass(frozen=True)
class Provider:
    """One way to compute the case: ``run()``, or ``run(prepare())`` of which only ``run`` is timed."""

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    checked: bool = True  # False for a floor, which computes something simpler
    check: Callable[[Any], float | None] | None = None  # instead of the case's

    def call(self) -> Any:
        return self.run() if self.prepare is None else self.run(self.prepare())


@dataclasses.dataclass
class Timing:
    """The samples of one provider, in seconds, or the reason why there are none."""

    name: str
    samples: list[float] = dataclasses.field(default_factory=list)
    calls: int = 1  # per sample
    error: float | None = None  # as the check reports it
    failed: str = ""

    def quantile(self, fraction: float) -> float:
        ordered = sorted(self.samples)
        position = fraction * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return statistics.median(self.samples) if self.samples else math.nan


@dataclasses.dataclass(frozen=True)
class Comparison:
    timings: dict[str, Timing]
    baseline: str
    interrupted: bool
    load: float  # the machine's load average when the first round began

    def ratio(self, name: str) -> float:
        """How many times faster than the baseline."""
        return self.timings[self.baseline].median / self.timings[name].median


# ---- command line ----


def parse(
    question: str,
    description: str | None,
    argv: list[str] | None,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> argparse.Namespace:
    """The options that every question has and those that `add` adds; sets the thread count.

    ``command`` of the result is the command line that asks the same question again.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m bench {question}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if add is not None:
        add(parser)
    add = parser.add_argument
    add("--quick", action="store_true", help="few rounds, for a look; recorded apart from full runs")
    add(
        "--seconds",
        type=float,
        help="time to spend per case (default: 10; with --quick: 3), but 5 rounds at least (--quick: 3)",
    )
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: %(default)s)")
    add("--only", metavar="TEXT", help="cases whose title contains TEXT")
    add("--tf32", action="store_true", help="fp32 products in TF32, where the device knows it")
    add("--no-picture", action="store_true", help="write the CSV alone; `python -m bench plots` draws it later")
    add("--results", type=Path, metavar="FOLDER", default=ROOT / "bench" / "results", help="default: bench/results")
    add(
        "--huge-pages",
        action="store_true",
        help="let PyTorch ask for 2 MB pages too (THP_MEM_ALLOC_ENABLE=1), as randlora's CPU operators always do",
    )
    argv = sys.argv[1:] if argv is None else argv
    chosen = parser.parse_args(argv)
    chosen.command = shlex.join(["python", "-m", "bench", question, *without(argv, "--results")])
    if chosen.huge_pages and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        # PyTorch reads it once, when it allocates first: start over with it.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"THP_MEM_ALLOC_ENABLE": "1"})
    if chosen.seconds is None:
        chosen.seconds = 3.0 if chosen.quick else 10.0
    if torch.device(chosen.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device")
    torch.set_num_threads(chosen.threads)
    torch.set_float32_matmul_precision("high" if chosen.tf32 else "highest")
    return chosen


def dtype_name(dtype: torch.dtype) -> str:
    """As columns and titles have it: fp32 whose products are TF32 is "tf32"."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def without(argv: Sequence[str], option: str) -> Iterator[str]:
    """`argv` without an option that takes a value: where results go is not what they depend on."""
    rest = iter(argv)
    for word in rest:
        if word == option:
            next(rest, None)
        elif not word.startswith(f"{option}="):
            yield word


# ---- time ----


def compare(
    title: str,
    factories: Mapping[str, Callable[[], Provider]],
    *,
    baseline: str,
    check: Callable[[Any], float | None],
    options: argparse.Namespace,
    clock: Any = None,
) -> Comparison:
    """Time providers side by side for about ``options.seconds``.

    Args:
        factories: name -> function that sets a provider up. One that cannot be set up, or whose result `check` rejects
            with an ``AssertionError``, is reported as failed and left out.
        baseline: the provider that ratios refer to.
        check: gets what a provider's ``run`` returns, and returns the error to be recorded.
        clock: what takes the time, as :func:`timer` gives it (default).
    """
    timings = {name: Timing(name) for name in factories}
    providers: dict[str, Provider] = {}
    interrupted = False
    load = os.getloadavg()[0]
    clock = clock or timer(options.device)
    bar = tqdm(desc=title, total=len(factories), unit="provider", leave=False, disable=None)
    try:
        turns = {}
        for name, factory in factories.items():
            bar.set_postfix_str(f"set up {name}")
            try:
                provider = factory()
                result = provider.call()
                timings[name].error = (provider.check or check)(result) if provider.checked else None
                del result
                once = clock.turn(provider, 1)
            except Exception as problem:
                timings[name].failed = reason(problem)
                tqdm.write(f"{title}: {name} cannot run: {timings[name].failed}")
            else:
                providers[name] = provider
                timings[name].calls = max(1, min(100, math.ceil(TURN_SECONDS / max(once, 1e-7))))
                turns[name] = once * (timings[name].calls + 1)
            bar.update()
        rounds = max(3 if options.quick else 5, min(MAX_ROUNDS, int(options.seconds / max(sum(turns.values()), 1e-3))))
        bar.reset(total=rounds * len(providers))
        bar.unit = "turn"
        load = os.getloadavg()[0]
        if load > (os.cpu_count() or 1) + 0.5:
            # Threads then wait for each other's share of a core, milliseconds at every parallel call: a provider that
            # computes on one thread looks many times too good.
            tqdm.write(f"  other programs are running (load {load:.1f}): do not believe this run's ratios")
        shuffle = random.Random(0).shuffle
        gc.collect()
        gc.disable()
        for _ in range(rounds):
            order = list(providers)
            shuffle(order)
            for name in order:
                bar.set_postfix_str(name, refresh=False)
                try:
                    timings[name].samples.append(clock.turn(providers[name], timings[name].calls))
                except torch.OutOfMemoryError as problem:  # beside what the others keep
                    timings[name].failed, timings[name].samples = reason(problem), []
                    tqdm.write(f"{title}: {name} is given up: {timings[name].failed}")
                if timings[name].failed:  # now that no traceback holds anything
                    del providers[name]
                    gc.collect()
                bar.update()
    except KeyboardInterrupt:
        interrupted = True
        tqdm.write(f"{title}: stopped; what has been measured is kept")
    finally:
        gc.enable()
        bar.close()
    return Comparison(timings, baseline, interrupted, load)


def reason(problem: Exception, checked: bool = True) -> str:
    """Why something cannot be measured, on one line. `checked`: an AssertionError is that of a check."""
    first = next(iter(str(problem).splitlines()), "")
    if isinstance(problem, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in first:
        return "out of memory"
    kind = "wrong result" if checked and isinstance(problem, AssertionError) else type(problem).__name__
    return f"{kind}: {first}"[:200]


def timer(device: str) -> _CpuTimer | _CudaTimer:
    return _CudaTimer() if torch.device(device).type == "cuda" else _CpuTimer()


class _CpuTimer:
    def turn(self, provider: Provider, calls: int) -> float:
        """Mean seconds of a call."""
        if calls > 1:
            provider.call()
        total = 0.0
        for _ in range(calls):
            prepared = () if provider.prepare is None else (provider.prepare(),)
            start = time.perf_counter()
            result = provider.run(*prepared)
            total += time.perf_counter() - start
            del result, prepared
        return total / calls


class _CudaTimer:
    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(None).L2_cache_size
        self.flush = torch.empty(2 * max(cache, 2**25), dtype=torch.int8, device="cuda")

    def turn(self, provider: Provider, calls: int) -> float:
        """Mean seconds of a call on the device; writing the flush buffer hides the launches from the clock."""
        if calls > 1:
            provider.call()
        events = []
        for _ in range(calls):
            prepared = () if provider.prepare is None else (provider.prepare(),)
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            start.record()
            result = provider.run(*prepared)
            end.record()
            del result, prepared
            events.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / 1000 / calls


# ---- text ----


def table(comparison: Comparison, reached: Mapping[str, str] | None = None) -> str:
    """What a person reads while it runs. `reached`: provider -> fraction of the floor."""
    width = max(map(len, comparison.timings))
    head = f"  {'':{width}}  {'median':>10}  {'20% .. 80%':>19}  {'x ' + comparison.baseline:>8}"
    lines = [head + ("  floor / it" if reached else "")]
    for name, timing in comparison.timings.items():
        if not timing.samples:
            lines.append(f"  {name:{width}}  {timing.failed or 'not measured'}")
            continue
        spread = f"{1e3 * timing.quantile(0.2):.3f} .. {1e3 * timing.quantile(0.8):.3f}"
        line = f"  {name:{width}}  {1e3 * timing.median:7.3f} ms  {spread:>19}  {comparison.ratio(name):8.2f}"
        part = f"{float(reached[name]):.0%}" if reached and name in reached else ""
        lines.append(f"{line}  {part:>10}" if reached else line)
    return "\n".join(lines)
