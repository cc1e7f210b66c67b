"""bench/results/REPORT.md: tables and pictures of every machine's results, drawn from the CSV files and nothing else.

The first tables hold the rows that README.md shows, each with the command that measures it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: python bench/report.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from bench import plots, records, report_tables, scaling_views
from bench.__main__ import summary
from bench.plots import Row, usable
from bench.quality import summary as quality
from bench.report_tables import caption, command, markdown, milliseconds, number
from bench.settings import table as settings

INTRODUCTION = """# Benchmark results

Made by `python -m bench report` from the CSV files beside it; edit nothing here. What was expected, and why it came
out as it did: `bench/NOTES.md`. Times are medians of interleaved turns, after a check of every result; quantiles,
errors and loads are in the CSV files. A quick run is a look, not a measurement."""

# CSV -> the script that writes it, in the report's order
FILES = {
    "model": "model", "linear": "linear", "linear-grid": "linear", "kinds": "kinds", "density": "kinds",
    "generate": "generate", "generate-layer": "generate", "host": "host", "bases": "bases",
    "unique_base": "unique_base", "memory": "memory", "fit": "fit", "scaling": "scaling", "export": "export",
    "export-merged": "export", "experts": "experts", "quantized": "quantized",
    "quality": "quality", "settings": "settings",
}  # fmt: skip


# ---- README's rows ----


def tokens(value: float) -> str:
    return f"{number(value)} tokens/s"


def size(value: float) -> str:
    return f"{number(value / 2**20)} MiB"


@dataclass(frozen=True)
class Wanted:
    """A row of README's table: of each provider one cell, with a value per case, joined by slashes.

    Attributes:
        text: what was measured; the columns of the first case's row may be named in it.
        cases: columns that tell the case's rows, per case.
        providers: randlora's, PEFT's RandLoRA, PEFT's LoRA; "" for none.
    """

    text: str
    file: str
    cases: Sequence[dict[str, str]]
    column: str = "median_ms"
    show: Callable[[float], str] = milliseconds
    providers: tuple[str, str, str] = ("randlora", "PEFT RandLoRA", "PEFT LoRA")


STEP = {"pass": "forward + backward", "kind": "dense", "dtype": "float32", "d": "1024", "T": "1024", "r": "32"}
BF16 = STEP | {"dtype": "bfloat16"}
OWN = ("randlora", "PEFT", "")
README = (
    Wanted("a training step of MiniLM (22 M), all linear layers, {batch} x {tokens} tokens", "model",
           [{"model": "MiniLM-L6", "depth": "6/6", "r": "32"}]),
    Wanted("the same of Llama-3.2-3B, {depth} layers, q and v, {batch} x {tokens} tokens, {dtype}", "model",
           [{"model": "Llama-3.2-3B", "r": "32"}]),
    Wanted("memory at that step's peak, beside the frozen model", "model", [{"model": "Llama-3.2-3B", "r": "32"}],
           "peak_bytes", size),
    Wanted("a layer's training step, d = 1024, T = 1024 / 4096", "linear", [STEP, STEP | {"T": "4096"}]),
    Wanted("the same with very sparse bases", "kinds",
           [STEP | {"kind": "very_sparse"}, STEP | {"kind": "very_sparse", "T": "4096"}]),
    Wanted("kept for backward by that layer, d = T = 1024, fp32 / bf16", "linear", [STEP, BF16], "saved_bytes", size),
    Wanted("memory at that step's peak, beside weight and bases", "linear", [STEP, BF16], "peak_bytes", size),
    Wanted("decoding with {model}, {depth} layers, {batch} prompt, adapter cached", "generate",
           [{"model": "Llama-3.2-3B", "batch": "1", "r": "32"}], "tokens_per_second", tokens,
           ("randlora, cached", "PEFT RandLoRA", "PEFT LoRA")),
    Wanted("bases for {dim} x {dim}", "bases", [{"kind": "dense", "dtype": "float32"}], providers=OWN),
    Wanted("`UniqueBaseGrad` forward + backward, n = {n}, m = {m}", "unique_base",
           [{"pass": STEP["pass"], "dtype": "float32", "m": "4096"}], providers=OWN),
)  # fmt: skip


def readme_rows(folder: Path) -> tuple[list[list[str]], list[Row]]:
    """The table's rows, their last cell the command, as far as this machine has measured them; and the CSV's rows."""
    lines, used = [], []
    for wanted in README:
        rows = usable(folder / f"{wanted.file}.csv")
        cells: list[str] = []
        found: list[Row] = []
        for provider in wanted.providers:
            values = []
            for case in wanted.cases:
                row = newest(rows, case | {"provider": provider}, wanted.column)
                if row is not None:
                    found.append(row)
                    mark = " (quick)" if row["mode"] == "quick" else ""
                    values.append(wanted.show(float(row[wanted.column])) + mark)
                elif provider:
                    values.append("?")
            cells.append("" if set(values) <= {"?"} else " / ".join(values))
        if found:
            commands = dict.fromkeys(f"`{command(row, wanted.file)}`" for row in found)
            lines.append([wanted.text.format(**found[0]), *cells, ", ".join(commands)])
            used += found
    return lines, used


def newest(rows: Sequence[Row], what: dict[str, str], column: str) -> Row | None:
    """Of the rows that are `what` and have a value; those of default pages and most threads come first."""
    found = [row for row in rows if row.get(column) and all(row.get(key) == value for key, value in what.items())]
    return max(found, key=lambda r: (r["mode"] == "full", r["pages"] == "default", int(r["threads"]), r["date"]),
               default=None)  # fmt: skip


# ---- a machine ----


def machine(folder: Path) -> str:
    about = json.loads((folder / "machine.json").read_text()) if (folder / "machine.json").exists() else {}
    gpu = about.get("gpu") or {}
    parts = [
        gpu and f"{gpu['name']}, {gpu['memory_GiB']} GiB",
        about and f"{about['cpu']}, {about['cores']} cores, {about['memory_GiB']} GiB, {about['system']}",
        about and f"Python {about['python']}, transparent huge pages: {about['transparent_hugepages']}",
    ]
    return "; ".join(part for part in parts if part)


def section(path: Path, pictures: Sequence[Path], root: Path) -> list[str]:
    """Of one CSV: its pictures, and for every thread count, page size and mode its tables."""
    script = FILES.get(path.stem)
    about = f": {summary(script)}" if script else ""
    parts = [f"### {path.stem}{about}"]
    parts += [f"![{path.stem}]({os.path.relpath(picture, root)})" for picture in pictures]
    if path.stem == "scaling":
        return parts + scaling_views.sections(path, markdown)
    if path.stem == "quality":
        return parts + quality.sections(path)
    if path.stem == "settings":
        return parts + settings.sections(path)
    rows = usable(path)
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["threads"], row["pages"], row["mode"]), []).append(row)
    for (threads, pages, mode), group in groups.items():
        if len(groups) > 1 or mode == "quick":
            parts.append(f"**{threads} threads, {pages} pages{', a quick run' if mode == 'quick' else ''}**")
        parts.append(caption(group, path.stem))
        if path.stem == "memory":
            parts.append(report_tables.memory_table(group))
        else:
            parts += report_tables.tables(group)
        if path.stem == "linear-grid":
            parts.append(report_tables.grid_summary([row for row in group if row["median_ms"]]))
    return parts


def views(folder: Path) -> list[Path]:
    return sorted((folder / "memory").glob("*.png"))


def write(results: Path) -> Path:
    """Draws all pictures anew and writes REPORT.md. Raises ``SystemExit`` where there are no results."""
    folders = sorted({path.parent for path in results.glob("*/*.csv")})
    if not folders:
        raise SystemExit(f"there are no results in {results}: python -m bench --help lists what makes some")
    parts = [INTRODUCTION]
    details: list[str] = []
    paths = {folder: sorted(folder.glob("*.csv"), key=order) for folder in folders}
    bar = tqdm([path for found in paths.values() for path in found], desc="report", unit="file", disable=None)
    for path in bar:
        bar.set_postfix_str(f"{path.parent.name}/{path.name}")
        folder = path.parent
        if path == paths[folder][0]:
            details += [f"## {folder.name}", machine(folder)]
            lines, used = readme_rows(folder)
            if lines:
                head = ["", "randlora", "PEFT RandLoRA", "PEFT LoRA", "command"]
                parts += [f"## README's rows: {folder.name}", markdown(head, lines), caption(used, "")]
        pictures = plots.draw(path) + (views(folder) if path.stem == "memory" else [])
        details += section(path, pictures, results)
    target = results / "REPORT.md"
    target.write_text("\n\n".join(part for part in [*parts, *details] if part) + "\n")
    return target


def order(path: Path) -> tuple[int, str]:
    known = list(FILES)
    return known.index(path.stem) if path.stem in known else len(known), path.stem


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder with the machines' folders")
    print(write(parser.parse_args(argv).results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
