"""Is what a device computes right? Bases bit for bit those of the CPU, every op and strategy against float64.

Random parameters, wide, tall and odd layers, every dtype and form of the bases; seconds, and a table of the worst
errors. The tests ask the same more sharply; this is what a new device is asked first, and small enough to run under
compute-sanitizer (``--few``). Whoever adds an op, a kind of bases or a strategy adds it to ``correct_checks.py``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python bench/correct.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from bench import measure, records
from bench.correct_checks import Check, checks


def relative_error(got: Tensor, true: Tensor, exact: bool) -> float:
    if got.shape != true.shape:
        return float("inf")
    if exact:
        return 0.0 if torch.equal(got.cpu(), true) else float("inf")
    error = ((got.cpu().double() - true).norm() / true.norm()).item()
    return error if error == error else float("inf")  # NaN


def rows_of(check: Check) -> list[dict[str, Any]]:
    """One per result; one alone, with the reason, where it cannot be had."""
    try:
        pairs = check.run()
        errors = [relative_error(*pair, exact=check.allowed == 0) for pair in pairs]
    except Exception as problem:
        return [check.about | {"result": "all", "error": "inf", "failed": measure.reason(problem)}]
    return [
        check.about
        | {"result": name, "error": f"{error:.2e}", "allowed": check.allowed,
           "failed": "" if error <= check.allowed else "wrong"}
        for name, error in zip(check.results, errors, strict=False)
    ]  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[str]:
    """The worst error of each op, kind and dtype, and what failed."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["op"], row.get("kind", ""), row.get("dtype", "all dtypes")), []).append(row)
    lines = []
    for names, found in groups.items():
        worst = max(found, key=lambda row: float(row["error"]))
        said = f"{len(found)} results, worst {worst['error']} ({worst['result']} {worst['shape']})"
        lines.append(f"{' '.join(filter(None, names)):44} {said}")
    lines += [f"FAILED {' '.join(str(value) for value in row.values())}" for row in rows if row["failed"]][:20]
    return lines


def main(argv: list[str] | None = None) -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--few", action="store_true", help="fewer sizes, for a run under compute-sanitizer")
        parser.add_argument("--no-layers", action="store_true",
                            help="the kernels without cuBLAS's, of which some fail under racecheck")  # fmt: skip

    options = measure.parse("correct", __doc__, argv, add=add)
    found = checks(torch.device(options.device), options.few, layers=not options.no_layers)
    rows = [row for check in found for row in rows_of(check)]
    records.put_beside(options, "correct", rows)
    print("\n".join(summary(rows)))
    failed = sum(bool(row["failed"]) for row in rows)
    print(f"{len(rows) - failed} results right, {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
