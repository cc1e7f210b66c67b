"""The table of gpu.sh: the outcome of every step, then what the steps' CSV files say, shortest form."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LINES = 60
WIDTH = 150
Row = dict[str, str]

# Of a case, in the head of a column; the rest is the same for all of a call's rows.
CASE_COLUMNS = (
    "model",
    "base",
    "targets",
    "pass",
    "kind",
    "d",
    "T",
    "dim",
    "n",
    "m",
    "batch",
    "tokens",
    "new_tokens",
    "dtype",
)
SHORT = {"forward + backward": "step"}
LAUNCHES = ("kind", "strategy", "d", "T", "launches", "from_the_code", "device_ms", "host_ms", "step_ms", "graph_ms",
            "waits", "failed")  # fmt: skip
NOTEWORTHY = re.compile(r"passed|failed|skipped|[Ee]rror|ERROR SUMMARY|wrong|hazard|out of memory|cannot|believe")
NCU = {
    "gpu__time_duration.sum": "us", "dram__throughput.avg.pct_of_peak_sustained_elapsed": "dram %",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "sm %",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %", "launch__registers_per_thread": "registers",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "conflicts",
}  # fmt: skip


def note(log: Path) -> str:
    """The last line of a log that says how it went; "" for none."""
    lines = log.read_text(errors="replace").splitlines()[1:]
    said = [line for line in lines if NOTEWORTHY.search(line)]
    return said[-1].strip("= ")[:90] if said else ""


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: str, outcomes: Sequence[Any], results: Path, lines: int | None) -> str:
    """`outcomes`: of gpu.py. `lines`: at most so many; None: all."""
    parts = [machine(head, results)]
    parts += [
        f"{one.step.name:12} {one.said:22} {one.seconds:4.0f} s of {one.step.expected:3}  {one.note}"
        for one in outcomes
    ]
    for path in sorted(results.glob("*/*.csv")):
        parts += times(path)
    for pattern, show in SHOWN.items():
        for path in results.glob(pattern):
            parts += show(path)
    parts = [line[:WIDTH].rstrip() for line in parts]
    if lines is not None and len(parts) > lines:
        parts = [*parts[: lines - 1], f"... {len(parts) - lines + 1} more lines are in the file of this table"]
    return "\n".join(parts)


def machine(head: str, results: Path) -> str:
    for path in sorted(results.glob("*/*.csv")):
        for row in read(path):
            versions = ", ".join(
                f"{name} {row[name]}" for name in ("driver", "torch", "peft", "commit") if row.get(name)
            )
            return f"{head}, {row.get('gpu') or row.get('cpu')}, {versions}"
    return head


# ---- times ----


def times(path: Path) -> list[str]:
    """A block of one CSV: a line per provider, a column per case, as :func:`cell` says it."""
    rows = read(path)
    if not rows or "provider" not in rows[0]:
        return []
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row.get(column, "") for column in CASE_COLUMNS), []).append(row)
    told_apart = [i for i in range(len(CASE_COLUMNS)) if len({case[i] for case in cases}) > 1]
    heads = ["/".join(SHORT.get(case[i], case[i]) for i in told_apart) or path.stem for case in cases]
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    width = max(map(len, providers))
    same = [f"{name} {value}" for i, (name, value) in enumerate(zip(CASE_COLUMNS, next(iter(cases)), strict=True))
            if i not in told_apart and value and name not in ("pass", "kind")]  # fmt: skip
    of_case = [next((row["baseline"] for row in found if row.get("baseline")), "") for found in cases.values()]
    baseline = next(filter(None, of_case), "")
    # A case without that method has another one to compare with.
    heads = [
        f"{head} (x {own})" if own not in ("", baseline) else head for head, own in zip(heads, of_case, strict=True)
    ]
    lines = [f"-- {path.stem}: ms, x {baseline}, % of floor, peak MiB; {', '.join(same)}"]
    columns = [
        [head, *(cell(found, name) for name in providers)] for head, found in zip(heads, cases.values(), strict=True)
    ]
    while columns:  # as many beside each other as a line holds
        fitting, columns = _fitting(columns, WIDTH - width)
        sizes = [max(map(len, column)) for column in fitting]
        for i, name in enumerate(["", *providers]):
            lines.append(
                f"{name:{width}} | " + " | ".join(f"{c[i]:{size}}" for c, size in zip(fitting, sizes, strict=True))
            )
    return lines


def _fitting(columns: list[list[str]], width: int) -> tuple[list[list[str]], list[list[str]]]:
    """The first columns that `width` has room for, one at least, and the others."""
    ends = itertools.accumulate(3 + max(map(len, column)) for column in columns)
    count = max(1, sum(end <= width for end in ends))
    return columns[:count], columns[count:]


def cell(rows: Sequence[Row], provider: str) -> str:
    """ms, times the baseline's speed, the part of the floor's, MiB at the peak; as far as they are known."""
    row = next((row for row in rows if row["provider"] == provider), None)
    if row is None:
        return ""
    if row.get("failed"):
        return row["failed"][:24]
    said = f"{float(row['median_ms']):.4g}" if row.get("median_ms") else "-"
    said += f" {float(row['times_faster']):.2f}x" if row.get("times_faster") else ""
    said += f" {float(row['reached']):.0%}" if row.get("reached") else ""
    said += f" {int(row['peak_bytes']) / 2**20:.0f}M" if row.get("peak_bytes") else ""
    return said


# ---- what is no table of times ----


def launches(path: Path) -> list[str]:
    rows = [[row.get(column, "") for column in LAUNCHES] for row in read(path)]
    return ["-- launches: " + ", ".join(LAUNCHES), *("  ".join(filter(None, row)) for row in rows)]


def kernels(path: Path) -> list[str]:
    found = [f"{row['case']:40} {'  '.join(list(row.values())[1:]):20}" for row in read(path)]
    pairs = [" | ".join(found[i : i + 2]) for i in range(0, len(found), 2)]
    return ["-- kernels: MB, us, % of the memory's bandwidth", *pairs]


def correct(path: Path) -> list[str]:
    """What failed, and for each dtype the worst error of a layer."""
    rows = read(path)
    failed = [" ".join(filter(None, row.values())) for row in rows if row["failed"]]
    worst: dict[str, float] = {}
    for row in rows:
        if row["op"] == "layer":
            worst[row["dtype"]] = max(worst.get(row["dtype"], 0.0), float(row["error"]))
    said = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items())
    return [f"-- against float64: {len(rows)} results, {len(failed)} wrong; worst layers: {said}", *failed[:5]]


def ncu(path: Path) -> list[str]:
    """Names, units, then a line per kernel, after whatever else ncu has to say."""
    lines = path.read_text(errors="replace").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    found = []
    for row in list(csv.DictReader(lines[start:]))[1:]:
        name = re.sub(r"^.*?randlora::cuda::(?:\(anonymous namespace\)::)?|\(.*", "", row["Kernel Name"])
        found.append(f"{name[:44]:44} " + "  ".join(f"{row.get(metric, '?'):>9}" for metric in NCU))
    return ["-- ncu: " + ", ".join(NCU.values()), *found]


def quality(path: Path) -> list[str]:
    """A table per task, a line per method."""
    from bench.quality import summary
    from bench.quality.records import load

    found = [f"-- quality, {summary.text(summary.summary(rows))}" for rows in load(path).values()]
    return [line for text in found for line in text.splitlines()]


SHOWN = {"*/kernels/correct.csv": correct, "*/kernels/launches.csv": launches, "*/kernels/kernels.csv": kernels,
         "ncu.csv": ncu, "*/quality.csv": quality}  # fmt: skip
