"""Pictures of the results, drawn from the CSV files and nothing else (`python -m bench plots` draws all anew)."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path

if not __package__:  # run as a file: python bench/plots.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import records

Row = dict[str, str]

COLORS = {"randlora": "#c8102e", "PEFT": "#404040", "floor": "#cccccc"}
OTHERS = "#6b9ac4"


def draw(path: Path) -> list[Path]:
    """Pictures of one CSV: a panel per case, a bar per provider; one picture per thread count and page size."""
    rows = [row for row in records.read(path) if row["median_ms"]] if path.exists() else []
    pictures: dict[tuple[str, str], dict[tuple[str, ...], dict[str, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        providers = pictures[row["threads"], row["pages"]][_case(row)]
        if row["mode"] == "full" or providers.get(row["provider"], {}).get("mode") != "full":
            providers[row["provider"]] = row
    drawn = []
    for (threads, pages), panels in pictures.items():
        name = path.stem + ("" if pages == "default" else f"-{pages.replace(' ', '')}-pages") + f"-{threads}threads"
        drawn.append(_picture(path.with_name(f"{name}.png"), panels, f"{path.stem}, {threads} threads, {pages} pages"))
    return drawn


def _case(row: Row) -> tuple[str, ...]:
    """The columns before the provider's, as "dtype=float32"; words go without the column's name."""
    columns = list(row)[: list(row).index("provider")]
    return tuple(f"{column} = {row[column]}" if row[column].isdigit() else row[column] for column in columns)


def _picture(path: Path, panels: dict[tuple[str, ...], dict[str, Row]], title: str) -> Path:
    across = min(3 if len(panels) % 3 == 0 else 2, len(panels))
    down = -(-len(panels) // across)
    bars = max(map(len, panels.values()))
    size = (6.5 * across, 0.7 + down * (0.8 + 0.26 * bars))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (case, providers) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, ", ".join(case), list(providers.values()))
    newest = max((row for providers in panels.values() for row in providers.values()), key=lambda row: row["date"])
    machine = newest["gpu"] or newest["cpu"]
    versions = ", ".join(f"{package} {newest[package]}" for package in ("randlora", "torch", "peft"))
    figure.suptitle(
        f"{title}, median ms with 20% and 80% quantiles; x: times faster than {newest['baseline']}\n"
        f"{machine}, {versions}, commit {newest['commit']}, {newest['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _panel(axis, title: str, rows: list[Row]) -> None:
    rows = rows[::-1]  # the first provider on top
    medians = [float(row["median_ms"]) for row in rows]
    low = [median - float(row["q20_ms"]) for median, row in zip(medians, rows, strict=True)]
    high = [float(row["q80_ms"]) - median for median, row in zip(medians, rows, strict=True)]
    names = [row["provider"] for row in rows]
    colors = [next((c for prefix, c in COLORS.items() if name.startswith(prefix)), OTHERS) for name in names]
    axis.barh(names, medians, xerr=(low, high), color=colors, error_kw={"lw": 1, "ecolor": "#222222"})
    for y, row in enumerate(rows):
        compared = row["times_faster"] and row["provider"] != row["baseline"]
        faster = f"   {float(row['times_faster']):.3g} x" if compared else ""
        end = max(float(row["q80_ms"]), medians[y])
        axis.annotate(
            f"{row['median_ms']} ms{faster}", (end, y), (4, 0), textcoords="offset points", va="center", fontsize=8
        )
    axis.set_xlim(0, 1.4 * max(float(row["q80_ms"]) for row in rows))
    quick = " (quick)" if any(row["mode"] == "quick" for row in rows) else ""
    axis.set_title(title + quick, fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder with the machines' folders")
    for path in sorted(parser.parse_args(argv).results.glob("*/*.csv")):
        for picture in draw(path):
            print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
