"""What every question does with its cases: announce, set up, compare, print, record; until they end or Ctrl-C."""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from bench import floors, measure
from bench.floors import Work
from bench.measure import Comparison, Provider
from bench.records import EVERYTHING, Book

Columns = dict[str, dict[str, Any]]  # provider -> column -> value


@dataclass(frozen=True)
class Setup:
    """A case that is ready to be timed.

    Attributes:
        factories, baseline, check: see :func:`bench.measure.compare`.
        dtype: of the product that is the ceiling.
        work: provider -> its floor; one for all of them; or what tells it once the providers have run.
        extra: further columns, and whether Ctrl-C came while they were measured; may print.
        clock: see :func:`bench.measure.compare`.
    """

    factories: Mapping[str, Callable[[], Provider]]
    baseline: str
    check: Callable[[Any], float | None]
    dtype: torch.dtype = torch.float32
    work: Mapping[str, Work] | Work | Callable[[], Mapping[str, Work] | Work] | None = None
    extra: Callable[[Comparison], tuple[Columns, bool]] | None = None
    clock: Any = None


@dataclass(frozen=True)
class Case:
    """`columns` are the key's; `set_up` is called when the case's turn comes, as it takes memory."""

    title: str
    columns: Mapping[str, Any]
    set_up: Callable[[], Setup]


def answer(book: Book, cases: Iterable[Case], options: argparse.Namespace, draw: bool = True) -> bool:
    """Measure the cases whose title has ``options.only``; False after Ctrl-C. What has been measured is recorded."""
    go_on = True
    for case in cases:
        if options.only and options.only not in case.title:
            continue
        print(case.title, flush=True)
        go_on = _measure(book, case, options)
        gc.collect()
        if not go_on:
            break
    if draw and not options.no_picture:
        from bench import plots  # matplotlib takes seconds to load

        plots.draw(book.path)
    return go_on


def _measure(book: Book, case: Case, options: argparse.Namespace) -> bool:
    try:
        setup = case.set_up()
        ceilings = floors.ceilings(setup.dtype, options.device) if setup.work is not None else None
    except KeyboardInterrupt:
        tqdm.write(f"{case.title}: stopped before anything was measured")
        return False
    except Exception as problem:  # out of memory is a result; the other cases are smaller
        failed = measure.reason(problem, checked=False)
        book.put(case.columns, {EVERYTHING: {"median_ms": "", "failed": failed}})
        tqdm.write(f"{case.title}: cannot be set up: {failed}")
        return True
    result = measure.compare(
        case.title, setup.factories, baseline=setup.baseline, check=setup.check, options=options, clock=setup.clock
    )
    columns: Columns = {}
    stopped = result.interrupted
    try:
        if ceilings is not None:
            columns = floors.columns(_each(setup), ceilings, result)
        print(measure.table(result, {name: row["reached"] for name, row in columns.items()}))
        if ceilings is not None:
            print(f"  the machine: a copy {ceilings.copy / 1e9:.1f} GB/s, a product {ceilings.product / 1e9:.1f} G/s")
        if setup.extra is not None:
            found, interrupted = setup.extra(result)
            stopped = stopped or interrupted
            columns = {name: columns.get(name, {}) | found.get(name, {}) for name in {**columns, **found}}
    except KeyboardInterrupt:
        tqdm.write(f"{case.title}: stopped; the times are kept")
        stopped = True
    book.add(case.columns, result, columns)
    return not stopped


def _each(setup: Setup) -> Mapping[str, Work]:
    work = setup.work() if callable(setup.work) else setup.work
    return {name: work for name in setup.factories} if isinstance(work, Work) else work


def add_peaks(found: Columns, names: Iterable[str], peak: Callable[[str], int], column: str = "peak_bytes") -> bool:
    """Puts the bytes of each provider among its columns, as far as they can be had; whether Ctrl-C came."""
    for name in tqdm(list(names), desc="memory", unit="provider", leave=False, disable=None):
        try:
            found[name][column] = peak(name)
        except KeyboardInterrupt:
            tqdm.write("  stopped; what has been measured is kept")
            return True
        except Exception as problem:  # the times are worth keeping
            tqdm.write(f"  the memory of {name} is not known: {measure.reason(problem)}")
    return False
