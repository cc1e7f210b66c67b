"""What ``randlora.suggest`` rests on, from quality.csv: ``python -m bench.quality.evidence FILE...`` writes it anew.

Test results only, and all that a file has of a task: which rows are shown is not for anybody to choose. Of quick runs,
which have little data, those methods that were tested with as many seeds as full runs have.
Of a task that several files have, the first one's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path

from bench import ROOT
from bench.quality import records, summary
from randlora.suggestion.evidence import Row

TARGET = ROOT / "randlora" / "suggestion" / "rows.py"
HEAD = """What was measured. Written by ``python -m bench.quality.evidence``, not by hand; a test compares it."""
SEEDS = 3  # as `python -m bench quality` takes without --quick
FIRST_LINE = 5  # fields of a row


def rows_of(files: Iterable[Path], root: Path = ROOT) -> list[Row]:
    """Raises ``ValueError`` for a file that has no such results, or lies outside the repository."""
    found: dict[str, list[Row]] = {}
    for path in files:
        source = path.resolve().relative_to(root.resolve()).as_posix()
        told = False
        for task, rows in records.load(path).items():
            of_task = summary.summary(rows)
            seeds = 1 if rows[0]["mode"] == "full" else SEEDS
            lines = [line for line in of_task.lines if len(line.scores) >= seeds]
            if not lines:
                continue
            if of_task.baseline is not None and of_task.baseline.scores:
                lines.insert(0, of_task.baseline)
            told = True
            found.setdefault(task, [
                Row(
                    task=task, metric=of_task.row["metric"], larger_is_better=of_task.larger_is_better,
                    method=line.method, baseline=line is of_task.baseline, rate=float(line.rate) if line.rate else None,
                    score=_short(line.score) if line.finite else None,
                    spread=None if line.spread is None else _short(line.spread),
                    seeds=len(line.scores), source=source,
                )
                for line in lines
            ])  # fmt: skip
        if not told:
            raise ValueError(f"{source} has no test results of a full run, or of one with {SEEDS} seeds")
    return [row for rows in found.values() for row in rows]


def text(rows: Iterable[Row]) -> str:
    """The module that holds them, as ruff formats it."""
    lines = ""
    for row in rows:
        told = dataclasses.asdict(row)
        fields = [f"{name}={json.dumps(v) if isinstance(v, str) else repr(v)}" for name, v in told.items()]
        parts = [", ".join(part) for part in (fields[:FIRST_LINE], fields[FIRST_LINE:-1], fields[-1:])]
        lines += "    Row(" + ",\n        ".join(parts) + "),\n"
    return (
        f'"""{HEAD}"""\n\nfrom __future__ import annotations\n\nfrom .evidence import Row\n\nROWS: tuple[Row, ...] = '
        + (f"(\n{lines})  # fmt: skip\n" if lines else "()\n")
    )  # fmt: skip


def _short(number: float) -> float:
    return float(f"{number:.5g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, help="such as bench/results/nvidia-h200/quality.csv; none: no rows"
    )
    written = TARGET.with_suffix(".part")
    written.write_text(text(rows_of(parser.parse_args().files)))
    os.replace(written, TARGET)


if __name__ == "__main__":
    main()
