"""Pictures of the results, drawn from the CSV files and nothing else (`python -m bench plots` draws all anew)."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

if not __package__:  # run as a file: python bench/plots.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import records, scaling_views

Row = dict[str, str]

COLORS = {"randlora": "#c8102e", "PEFT": "#404040", "floor": "#cccccc"}
OTHERS = "#6b9ac4"
PANEL_CHARACTERS = 72  # of a title over one panel


def draw(path: Path) -> list[Path]:
    """Pictures of one CSV, one per thread count and page size; none of memory, which needs more than a CSV has."""
    if path.stem == "scaling":  # computed: no machine, no median
        return scaling_views.draw(path)
    if path.stem == "quality":
        from bench.quality import pictures  # its tables are made of those that import this module

        return pictures.draw(path)
    if path.stem == "settings":
        from bench.settings import pictures

        return pictures.draw(path)
    rows = [row for row in usable(path) if row.get("median_ms") or row.get("energy_left")]
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["threads"], row["pages"]].append(row)
    drawn = []
    for (threads, pages), group in groups.items():
        name = path.stem + ("" if pages == "default" else f"-{pages.replace(' ', '')}-pages") + f"-{threads}threads"
        title = f"{path.stem}, {threads} threads, {pages} pages"
        drawn.append(DRAWN_AS.get(path.stem, bars)(path.with_name(f"{name}.png"), group, title))
    return drawn


def case_of(row: Row) -> tuple[str, ...]:
    """The columns before the provider's, as "d = 1024"; words go without the column's name."""
    columns = list(row)[: list(row).index("provider")]
    return tuple(f"{column} = {row[column]}" if row[column].isdigit() else row[column] for column in columns)


def usable(path: Path) -> list[Row]:
    """The rows of a CSV, without the quick ones that a full run has replaced."""
    rows = records.read(path) if path.exists() else []

    def key(row: Row) -> tuple[str, ...]:
        return *case_of(row), row["provider"], row["device"], row["threads"], row["pages"]

    full = {key(row) for row in rows if row["mode"] == "full"}
    return [row for row in rows if row["mode"] == "full" or key(row) not in full]


def subtitle(rows: list[Row]) -> str:
    """On what it was measured, and when."""
    newest = max(rows, key=lambda row: row["date"])
    versions = ", ".join(f"{package} {newest[package]}" for package in ("randlora", "torch", "peft"))
    return f"{newest['gpu'] or newest['cpu']}, {versions}, commit {newest['commit']}, {newest['date'][:10]}"


# ---- bars: a panel per case, a bar per provider ----


def bars(path: Path, rows: list[Row], title: str) -> Path:
    panels: dict[tuple[str, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        panels[case_of(row)][row["provider"]] = row
    return _picture(path, panels, title)


def _picture(path: Path, panels: dict[tuple[str, ...], dict[str, Row]], title: str) -> Path:
    across = min(3 if len(panels) % 3 == 0 else 2, len(panels))
    down = -(-len(panels) // across)
    bars = max(map(len, panels.values()))
    size = (6.5 * across, 1 + down * (0.9 + 0.26 * bars))
    figure, axes = plt.subplots(down, across, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (case, providers) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, ", ".join(case), list(providers.values()))
    rows = [row for providers in panels.values() for row in providers.values()]
    floor = "; line: the floor" if any(row.get("floor_ms") for row in rows) else ""
    heading = f"{title}, median ms with 20% and 80% quantiles; x: times faster than {rows[-1]['baseline']}{floor}"
    width = PANEL_CHARACTERS * across
    figure.suptitle("\n".join(textwrap.fill(line, width) for line in (heading, subtitle(rows))), fontsize=9)
    return _save(figure, path)


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
        if row.get("floor_ms"):
            axis.plot([float(row["floor_ms"])] * 2, [y - 0.4, y + 0.4], color="black", lw=1.5)
    axis.set_xlim(0, 1.4 * max(float(row["q80_ms"]) for row in rows))
    quick = " (quick)" if any(row["mode"] == "quick" for row in rows) else ""
    axis.set_title(textwrap.fill(title + quick, PANEL_CHARACTERS), fontsize=9, loc="left")
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


# ---- other pictures ----


def density(path: Path, rows: list[Row], title: str) -> Path:
    """Time and bytes of a layer over the density of its bases (bench/kinds.py)."""
    of = {row["provider"]: row for row in rows}
    points = sorted((1 / float(name[4:]), row) for name, row in of.items() if name.startswith("z = "))
    densities = [x for x, _ in points]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    color = COLORS["randlora"]
    time.plot(densities, [float(r["median_ms"]) for _, r in points], "o-", color=color, label="randlora, ternary")
    for name, style in (("dense", "-"), ("PEFT RandLoRA", "--"), ("PEFT LoRA", ":")):
        if name in of:
            label = "randlora, dense" if name == "dense" else name
            shade = color if name == "dense" else COLORS["PEFT"]
            time.axhline(float(of[name]["median_ms"]), linestyle=style, color=shade, alpha=0.6, label=label)
    time.set(ylabel="ms per training step of a layer", ylim=(0, None), title="time")
    memory.plot(densities, [float(r["bases_bytes"]) / 2**20 for _, r in points], "o-", color=color)
    memory.axhline(float(of["dense"]["bases_bytes"]) / 2**20, color=color, alpha=0.6)
    memory.set(ylabel="MiB of bases (line: dense, fp32)", yscale="log", title="memory")
    for axis in (time, memory):
        axis.set_xscale("log", base=2)
        axis.set_xticks([2.0**-e for e in range(7)], ["1", *(f"1/{2**e}" for e in range(1, 7))])
        axis.set_xlabel("density of A and B")
        axis.grid(alpha=0.3)
    time.legend()
    row = points[0][1]
    figure.suptitle(f"d = {row['d']}, T = {row['T']}, r = {row['r']}, fp32, {title}\n{subtitle(rows)}", fontsize=10)
    return _save(figure, path)


STYLES = {"factored": "^--", "materialized": "s--", "merged": "v--"}


def grid(path: Path, rows: list[Row], title: str) -> Path:
    """Time of every strategy over the best forced one of its case, over T; a panel per layer (bench/linear.py)."""
    cases: dict[tuple[str, ...], dict[int, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        panel = tuple(part for part in case_of(row) if not part.startswith("T = "))
        cases[panel][int(row["T"])][row["provider"]] = float(row["median_ms"])
    across = min(2, len(cases))
    down = -(-len(cases) // across)
    figure, axes = plt.subplots(down, across, figsize=(6 * across, 0.6 + 3 * down), squeeze=False, layout="constrained")
    for axis in axes.flat[len(cases) :]:
        axis.set_visible(False)
    for axis, (panel, times) in zip(axes.flat, cases.items(), strict=False):
        for name in dict.fromkeys(name for found in times.values() for name in found):
            points = sorted((T, found) for T, found in times.items() if name in found and len(found) > 1)
            best = [min(ms for other, ms in found.items() if other != "randlora") for _, found in points]
            over = [found[name] / least for (_, found), least in zip(points, best, strict=True)]
            own = name == "randlora"
            style = "o-" if own else STYLES.get(name.removeprefix("randlora "), ".--")
            axis.plot(
                [T for T, _ in points], over, style, label="automatic choice" if own else name, lw=2 if own else 1,
                color=COLORS["randlora"] if own else None, alpha=1 if own else 0.7,
            )  # fmt: skip
        ticks = sorted(times)
        axis.set(xscale="log", ylim=(None, 3), xlabel="tokens", ylabel="time / best strategy's")
        axis.set_xticks(ticks, [str(T) for T in ticks])
        axis.minorticks_off()
        axis.set_title(", ".join(panel), fontsize=9, loc="left")
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    figure.suptitle(f"{title}, lines leave the picture above 3\n{subtitle(rows)}", fontsize=10)
    return _save(figure, path)


def fit(path: Path, rows: list[Row], title: str) -> Path:
    """What each kind of bases leaves of a target's energy; a panel per spectrum, a dot per seed (bench/fit.py)."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        found[row["spectrum"]][row["provider"]].append(float(row["energy_left"]))
    figure, axes = plt.subplots(1, len(found), figsize=(4.2 * len(found), 3.2), squeeze=False, layout="constrained")
    row = rows[-1]
    for axis, (spectrum, kinds) in zip(axes.flat, found.items(), strict=True):
        names = list(kinds)[::-1]  # the first one on top
        means = [sum(kinds[name]) / len(kinds[name]) for name in names]
        axis.barh(names, means, color=[OTHERS if name == "LoRA" else COLORS["randlora"] for name in names], alpha=0.6)
        for y, name in enumerate(names):
            axis.plot(kinds[name], [y] * len(kinds[name]), "k.", markersize=4)
            axis.annotate(f"{means[y]:.3f}", (0, y), (4, 0), textcoords="offset points", va="center", fontsize=8)
        alone = 1 - 1 / int(row["r"])
        axis.axvline(alone, color="black", lw=1, linestyle=":")
        axis.set(xlim=(0, 1), xlabel="energy left")
        axis.set_title(f"spectrum {spectrum}", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    heading = f"{title}: {row['d']} x {row['d']}, r = {row['r']}; line: what gamma alone leaves, 1 - 1/r; dots: seeds"
    figure.suptitle(f"{heading}\n{subtitle(rows)}", fontsize=9)
    return _save(figure, path)


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


DRAWN_AS = {"density": density, "fit": fit, "linear-grid": grid}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench plots", description=__doc__)
    parser.add_argument("--results", type=Path, default=records.RESULTS, help="folder with the machines' folders")
    for path in sorted(parser.parse_args(argv).results.glob("*/*.csv")):
        for picture in draw(path):
            print(picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
