"""Markdown tables of CSV rows, each with a line that says what the numbers depend on."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from bench.plots import Row, case_of
from bench.records import EVERYTHING
from bench.timeline import ORIGINS


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or math.isnan(value):
        return "0" if value == 0 else ""
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def milliseconds(value: float) -> str:
    return f"{number(value / 1000)} s" if value >= 1000 else f"{number(value)} ms"


def mebibytes(row: Row, column: str) -> str:
    return number(int(row[column]) / 2**20) if row.get(column) else "-"


def times(row: Row) -> str:
    said = [milliseconds(float(row["median_ms"]))]
    if row.get("times_faster") and row["baseline"] != row["provider"]:
        said.append(f"{float(row['times_faster']):.2f}x")
    if row.get("reached"):
        said.append(f"{float(row['reached']):.0%}")
    return f"{said[0]} ({', '.join(said[1:])})" if said[1:] else said[0]


# heading, columns of the CSV of which a row needs one, and what a cell says
METRICS: tuple[tuple[str, tuple[str, ...], Callable[[Row], str]], ...] = (
    ("Time: median (times faster than {baseline}{floor})", ("median_ms",), times),
    ("Tokens per second", ("tokens_per_second",), lambda row: number(float(row["tokens_per_second"]))),
    (
        "MiB kept for backward / at the peak of a step, above what was there before it",
        ("saved_bytes", "peak_bytes"),
        lambda row: f"{mebibytes(row, 'saved_bytes')} / {mebibytes(row, 'peak_bytes')}",
    ),
    ("MiB of bases", ("bases_bytes",), lambda row: mebibytes(row, "bases_bytes")),
    (
        "MiB of the result / beside it at the peak",
        ("result_bytes", "peak_above_result_bytes"),
        lambda row: f"{mebibytes(row, 'result_bytes')} / {mebibytes(row, 'peak_above_result_bytes')}",
    ),
    (
        "Part of the target's energy that is left (least that its rank allows)",
        ("energy_left",),
        lambda row: row["energy_left"] + (f" ({row['lowest']})" if row.get("lowest") else ""),
    ),
    ("Trainable parameters", ("trainable_parameters",), lambda row: f"{int(row['trainable_parameters']):,}"),
)


def tables(rows: Sequence[Row]) -> list[str]:
    """A table per metric that the rows have; cases one way, providers the other; then the reasons of those missing."""
    parts = []
    constant, cases = labels(rows)
    for heading, columns, cell in METRICS:
        found = [row for row in rows if any(row.get(column) for column in columns)]
        if found:
            floor = ceilings(found)
            if floor:
                floor = f", part of the floor reached: the machine does {floor}"
            about = heading.format(baseline=distinct(found, "baseline"), floor=floor)
            parts.append(f"{about}; {constant}:" if constant else f"{about}:")
            parts.append(pivot(found, cases, cell))
    parts += [f"- {row['provider']}, {cases[case_of(row)]}: {row['failed']}" for row in rows if row.get("failed")]
    return parts


def labels(rows: Sequence[Row]) -> tuple[str, dict[tuple[str, ...], str]]:
    """What all cases have in common, and case -> what tells it from the others."""
    cases = list(dict.fromkeys(case_of(row) for row in rows))
    same = [len({case[i] for case in cases}) == 1 for i in range(len(cases[0]))]
    common = ", ".join(part for part, s in zip(cases[0], same, strict=True) if s and part)
    return common, {
        case: ", ".join(part for part, s in zip(case, same, strict=True) if not s and part) or "this case"
        for case in cases
    }


def pivot(rows: Sequence[Row], labels: dict[tuple[str, ...], str], cell: Callable[[Row], str]) -> str:
    """The longer of cases and providers goes down."""
    cells = {(case_of(row), row["provider"]): cell(row) for row in rows}
    cases = list(dict.fromkeys(case for case, _ in cells))
    providers = list(dict.fromkeys(provider for _, provider in cells if provider != EVERYTHING))
    if len(cases) > len(providers):
        return markdown(
            ["", *providers], ([labels[case], *(cells.get((case, p), "") for p in providers)] for case in cases)
        )
    return markdown(
        ["", *(labels[case] for case in cases)], ([p, *(cells.get((case, p), "") for case in cases)] for p in providers)
    )


def memory_table(rows: Sequence[Row]) -> str:
    """Of bench/memory.py: bytes by origin at the peak."""
    cells = []
    for row in rows:
        where = f"{row['model']}, {row['depth']} layers, {row['batch']} x {row['tokens']}, {row['dtype']}"
        if row.get("failed"):
            cells.append([where, row["provider"], row["failed"], *[""] * len(ORIGINS)])
        else:
            origins = [mebibytes(row, f"{origin}_bytes") for origin in ORIGINS]
            cells.append([where, row["provider"], mebibytes(row, "peak_total_bytes"), *origins])
    return markdown(["model", "method", "peak, MiB", *ORIGINS], cells)


def grid_summary(rows: Sequence[Row], best: str = "randlora") -> str:
    """How near the automatic choice comes to the best strategy of each case."""
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        cases.setdefault(case_of(row), {})[row["provider"]] = float(row["median_ms"])
    over = [
        case[best] / min(ms for name, ms in case.items() if name != best) - 1
        for case in cases.values()
        if best in case and len(case) > 1
    ]
    if not over:
        return ""
    near = sum(value < 0.03 for value in over)
    return (
        f"The automatic choice takes at most 3% more than the best forced strategy in {near} of {len(over)} cases; "
        f"the worst is {max(over):+.1%}."
    )


# ---- what the numbers depend on ----


def distinct(rows: Iterable[Row], column: str) -> str:
    return ", ".join(dict.fromkeys(row[column] for row in rows if row.get(column)))


def ceilings(rows: Sequence[Row]) -> str:
    """Of the machine, from the least to the most that was measured; "" where nothing was."""

    def span(column: str) -> str:
        values = [float(row[column]) for row in rows if row.get(column)]
        return " to ".join(dict.fromkeys(number(value) for value in (min(values), max(values)))) if values else ""

    copy, product = span("copy_GB_per_s"), span("product_G_per_s")
    return f"{copy} GB/s in a copy, {product} G multiply-adds/s in a product" if copy else ""


def command(row: Row, question: str) -> str:
    """Older rows do not say it."""
    return row.get("command") or f"python -m bench {question}"


def caption(rows: Sequence[Row], question: str) -> str:
    """Which command on which machine with what, when: of all rows of a table."""
    commands = dict.fromkeys(command(row, question) for row in rows)
    days = sorted({row["date"][:10] for row in rows})
    versions = ", ".join(
        f"{package} {found}" for package in ("randlora", "torch", "peft") if (found := distinct(rows, package))
    )
    machine = distinct(rows, "gpu") or f"{distinct(rows, 'cpu')} ({distinct(rows, 'cpu_capability')})"
    driver = f", driver {distinct(rows, 'driver')}" if distinct(rows, "driver") else ""
    loads = [float(row["load"]) for row in rows if row.get("load")]
    load = f"; load up to {max(loads):.1f}" if loads else ""
    said = ", ".join(f"`{each}`" for each in commands)
    return (
        f"{said}  \n<sub>{machine}{driver}, threads: {distinct(rows, 'threads')}, "
        f"{distinct(rows, 'pages')} pages; {versions}; commit {distinct(rows, 'commit')}; "
        f"{' to '.join(dict.fromkeys((days[0], days[-1])))}{load}</sub>"
    )
