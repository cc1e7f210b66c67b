"""Pictures of settings.csv: loss over the learning rate, a panel for each start, a curve for each adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

from bench.settings import table
from bench.settings.book import Row, newest, read
from bench.settings.table import Curve

LINES = {4: "-", 32: "--", 128: ":"}
MARKERS = {"dense": "o", "hadamard": "s", "sparse": "^", "very_sparse": "v", "lora": "x"}
ACROSS = 2
OTHERS = "the rule with other numbers"


def draw(path: Path) -> list[Path]:
    """``settings-<task>.png`` beside the file for each of its tasks."""
    rows = newest(read(path))
    drawn = []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        if found := table.curves(mine):
            drawn.append(_picture(path.with_name(f"settings-{task}.png"), found, mine))
    return drawn


def _picture(path: Path, found: Sequence[Curve], rows: Sequence[Row]) -> Path:
    panels = _panels(found)
    # What each model can come to: curves of different models are compared by their distance from it.
    lowest: dict[int, float] = {}
    for curve in found:
        width = curve.column.width
        lowest[width] = min(curve.lowest, lowest.get(width, math.inf))
    colors = {width: plt.get_cmap("viridis")(i / max(1, len(lowest))) for i, width in enumerate(sorted(lowest))}
    across = min(ACROSS, len(panels))
    down = -(-len(panels) // across)
    size = (max(8.0, 5.2 * across), 0.8 + 3.9 * down)
    figure, axes = plt.subplots(
        down, across, figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    top = max(curve.before - lowest[curve.column.width] for curve in found)
    for axis, (name, group) in zip(axes.flat, panels.items(), strict=False):
        for curve in group:
            column = curve.column
            axis.plot(
                list(curve.losses),
                [min(loss, 1e9) - lowest[column.width] for loss in curve.losses.values()],
                color=colors[column.width] if name != OTHERS else None,
                linestyle=LINES.get(column.r, "-."),
                marker=MARKERS.get(column.kind, "."),
                markerfacecolor="none" if column.num_bases else None,
                markersize=4,
                linewidth=1,
                label=_label(curve, all_of_it=name == OTHERS),
            )
        if name != OTHERS:
            best, off = table.one_rate(group)
            axis.axvspan(best / 2, best * 2, color="#c8102e", alpha=0.08, linewidth=0)
            name += f": one rate {best:.1e}, {off:.1f} x off at worst"
        axis.set_title(name, fontsize=8, loc="left")
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_ylim(-0.03 * top, 1.1 * top)
        axis.legend(fontsize=6, ncols=2)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("learning rate (shaded: within a factor of 2 of the one rate)", fontsize=9)
    figure.supylabel("validation loss above the lowest of this model", fontsize=9)
    newest = max(rows, key=lambda row: row["date"])
    figure.suptitle(
        f"{newest['task']}, {newest['steps']} steps, {newest['gpu'] or newest['cpu']}, torch {newest['torch']}, "
        f"commit {newest['commit']}, {newest['date'][:10]}" + (" (quick)" if newest["mode"] == "quick" else ""),
        fontsize=9,
    )
    partial = path.with_suffix(".part.png")
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    partial.replace(path)
    return path


def _panels(found: Sequence[Curve]) -> dict[str, list[Curve]]:
    """PEFT's start beside the rule's, then LoRA; and the rule with other numbers in one panel of its own."""
    groups = sorted(table.grouped(found).items(), key=lambda group: -len(group[1]))
    panels: dict[str, list[Curve]] = {}
    for start in ("PEFT", "rule", "LoRA"):
        mine = [(name, group) for name, group in groups if group[0].column.start == start]
        if mine:
            panels[mine[0][0]] = mine[0][1]
        if others := [curve for _, group in mine[1:] for curve in group]:
            # With what they are to be compared with.
            adapters = {_label(curve) for curve in others}
            compared = [curve for curve in mine[0][1] if _label(curve) in adapters]
            panels[OTHERS] = [*panels.get(OTHERS, []), *compared, *others]
    if OTHERS in panels:
        panels[OTHERS] = panels.pop(OTHERS)  # the last
    return panels


def _label(curve: Curve, all_of_it: bool = False) -> str:
    column = curve.column
    if all_of_it:
        return str(column).removeprefix(f"{column.task} ")
    parts = [f"width {column.width}"] if column.width else []
    parts += [column.kind] if column.kind not in ("dense", "lora") else []
    parts += [f"r={column.r}"] + ([f"n={column.num_bases}"] if column.num_bases else [])
    return " ".join(parts)
