"""What quality.csv says of each method, and the tables that show it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.quality import rates
from bench.quality.plan import at_edge, best_rate
from bench.quality.records import PICK, TEST, TIMING, Row, by_method, load
from bench.report_tables import markdown, number


@dataclass
class Line:
    """One method on one task.

    Attributes:
        rate: the learning rate that was picked, as in the file; "" for the baseline.
        edge: "lowest tried" or "highest tried" where the best rate might lie beyond.
        scores, kept: one per seed.
        others: the same at rates that were tested and not picked (`--rate`, or another number of tries).
        trained, ms, peak: None where they are not known.
    """

    method: str
    rate: str = ""
    edge: str = ""
    scores: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    trained: int | None = None
    ms: float | None = None
    peak: int | None = None
    failed: str = ""
    others: list[Line] = field(default_factory=list)

    @property
    def score(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float | None:
        return _spread(self.scores)

    @property
    def finite(self) -> bool:
        """Whether there are scores, and all are numbers: what diverged has others."""
        return bool(self.scores) and all(map(math.isfinite, self.scores))


@dataclass
class Summary:
    """One task: the baseline, and the methods, in the order of :func:`bench.quality.methods.methods`.

    Attributes:
        row: any of the task's, for what they all say.
        machine: that of the timing, and those where other rows come from: scores do not depend on them, times do.
    """

    row: Row
    machine: str
    baseline: Line | None
    lines: list[Line]

    @property
    def larger_is_better(self) -> bool:
        return self.row["larger_is_better"] == "True"

    def forgotten(self, line: Line) -> float | None:
        """How much worse than the pretrained model on what that could do, in the metric's unit."""
        if not line.kept or self.baseline is None or not self.baseline.kept:
            return None
        less = self.baseline.kept[0] - statistics.fmean(line.kept)
        return less if self.row["larger_kept_is_better"] == "True" else -less


def summary(rows: Sequence[Row]) -> Summary:
    """`rows`: of one task, as :func:`bench.quality.records.newest` gives them."""
    row = rows[-1]
    lines = [_line(name, found) for name, found in by_method(rows).items()]
    baseline = next((line for line in lines if line.method == row["untuned"]), None)
    return Summary(row, _machines(rows), baseline, [line for line in lines if line is not baseline])


def _machines(rows: Sequence[Row]) -> str:
    def of(some: Sequence[Row]) -> list[str]:
        return list(dict.fromkeys(row["gpu"] or f"{row['cpu']} ({row['cpu_capability']})" for row in some))

    timed = of([row for row in rows if row["phase"] == TIMING])
    others = ", ".join(name for name in of(rows) if name not in timed)
    if timed and others:
        return f"{', '.join(timed)}; scores also of {others}"
    return ", ".join(timed) or others


def _line(name: str, rows: Sequence[Row]) -> Line:
    line = Line(name)
    tests = [row for row in rows if row["phase"] == TEST and row["score"]]
    picks = [row for row in rows if row["phase"] == PICK]
    losses = {row["rate"]: float(row["validation_loss"]) for row in picks if row["validation_loss"]}
    if tests:
        tested = {row["rate"] for row in tests}  # several, where another number of them was tried at another time
        line.rate = best_rate({rate: loss for rate, loss in losses.items() if rate in tested}) or tests[-1]["rate"]
        line.others = [Line(name, rate) for rate in sorted(tested - {line.rate}, key=float)]
        for one in (line, *line.others):
            same = [row for row in tests if row["rate"] == one.rate]
            one.scores = [float(row["score"]) for row in same]
            one.kept = [float(row["kept"]) for row in same if row["kept"]]
    tried = [float(row["rate"]) for row in picks]
    if line.rate and tried:
        line.edge = at_edge(float(line.rate), tried)
    for row in rows:
        line.trained = int(row["trained"]) if row["trained"] else line.trained
        if row["phase"] == TIMING:
            line.ms = float(row["ms_per_step"]) if row["ms_per_step"] else None
            line.peak = int(row["peak_bytes"]) if row["peak_bytes"] else None
    for other in line.others:
        other.trained, other.ms, other.peak = line.trained, line.ms, line.peak
    line.failed = next((row["failed"] for row in rows if row["failed"]), "")
    if losses and not tests and best_rate(losses) is None:
        line.failed = line.failed or "diverged at every learning rate"
    return line


# ---- text ----

HEAD = ("method", "learning rate", "{metric}", "{kept_metric}, before: {before}", "trained numbers", "ms a step",
        "peak, MiB", "")  # fmt: skip


def cells(found: Summary) -> list[list[str]]:
    """The head and a line per method, the baseline first."""
    before = f"{found.baseline.kept[0]:.4g}" if found.baseline and found.baseline.kept else "?"
    head = [text.format(before=before, **found.row) for text in HEAD]
    lines = [found.baseline] if found.baseline else []
    return [head, *(_cells(line) for line in [*lines, *found.lines])]


def _cells(line: Line) -> list[str]:
    notes = [line.edge, line.failed and f"failed: {line.failed}"]
    for other in line.others:
        kept = f", kept {statistics.fmean(other.kept):.4g}" if other.kept else ""
        notes.append(f"at {other.rate}: {_score(other.scores)}{kept}")
    if line.scores and line.rate and len(line.scores) < 2:
        notes.append("one seed")
    if diverged := sum(not math.isfinite(score) for score in line.scores):
        notes.append(f"diverged with {diverged} of {len(line.scores)} seeds")
    return [
        line.method,
        line.rate,
        _score(line.scores),
        f"{statistics.fmean(line.kept):.4g}" if line.kept else "",
        f"{line.trained:,}" if line.trained is not None else "",
        number(line.ms) if line.ms is not None else "",
        number(line.peak / 2**20) if line.peak is not None else "",
        "; ".join(filter(None, notes)),
    ]


def _score(scores: Sequence[float]) -> str:
    """Mean and standard deviation."""
    spread = _spread(scores)
    return (f"{statistics.fmean(scores):.4g}" if scores else "") + (f" ± {spread:.2g}" if spread is not None else "")


def _spread(scores: Sequence[float]) -> float | None:
    return statistics.stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else None


def about(row: Row) -> str:
    """What a table's numbers depend on."""
    better = "more" if row["larger_is_better"] == "True" else "less"
    quick = (
        "a quick run: little data, few steps, to be looked at and not to be quoted; " if row["mode"] == "quick" else ""
    )
    products = "" if row["precision"] == "float32" else f"products in {row['precision']}; "
    return f"{quick}{products}{row['steps']} steps; {row['metric']}: {better} is better"


def text(found: Summary) -> str:
    """As a person reads it in a terminal."""
    table = cells(found)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table]
    return "\n".join([f"{found.row['task']}: {about(found.row)}", *(f"  {line}" for line in lines)])


def page(found: Summary) -> str:
    """As Markdown, for docs/ and the report."""
    head, *lines = cells(found)
    return f"**{found.row['task']}** ({about(found.row)}):\n\n{markdown(head, lines)}"


def sections(path: Path) -> list[str]:
    """Of quality.csv, for the report."""
    groups = load(path)
    found = [summary(rows) for rows in groups.values()]
    last = found[-1].row
    machine = found[-1].machine
    versions = ", ".join(f"{package} {last[package]}" for package in ("randlora", "torch", "peft"))
    about_it = f"{machine}; {versions}; commit {last['commit']}; {last['date'][:10]}"
    tables = [text for one, rows in zip(found, groups.values(), strict=True) for text in (page(one), rates.page(rows))]
    return [f"`{last['command']}`  \n<sub>{about_it}</sub>", *filter(None, tables)]
