"""Pictures of quality.csv, one per task: the score over trained numbers, over seconds and over what is forgotten.

The line joins what nothing else beats in both: the Pareto front.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.quality.methods import FULL, Method, methods
from bench.quality.records import load
from bench.quality.summary import Line, Summary, summary

# family -> colour, marker, name in the legend
STYLES = {
    FULL: ("#1a1a1a", "s", "full fine-tuning"),
    "PEFT LoRA": ("#1f6fb4", "o", "PEFT LoRA"),
    "PEFT rsLoRA": ("#1f6fb4", "P", "PEFT rsLoRA"),
    "PEFT DoRA": ("#1f6fb4", "X", "PEFT DoRA"),
    "PEFT RandLoRA": ("#7a7a7a", "D", "PEFT RandLoRA"),
    "dense": ("#c8102e", "o", "randlora dense"),
    "hadamard": ("#e8743b", "^", "randlora hadamard"),
    "sparse": ("#8c2d82", "v", "randlora sparse"),
    "very_sparse": ("#2f8f5b", "<", "randlora very_sparse"),
}
FRONT = "#bbbbbb"
Point = tuple[float, float, Line]


def draw(path: Path) -> list[Path]:
    """A picture of every task that has results."""
    known = methods()
    drawn = []
    for task, rows in load(path).items():
        found = summary(rows)
        if any(line.scores for line in found.lines):
            drawn.append(picture(path.with_name(f"quality-{task}.png"), found, known))
    return drawn


def picture(path: Path, found: Summary, known: dict[str, Method]) -> Path:
    steps = int(found.row["steps"])
    panels: list[tuple[str, bool, Callable[[Line], float | None]]] = [
        ("trained numbers", True, lambda line: line.trained),
        (f"seconds of training, {steps} steps", True, lambda line: line.ms and line.ms * steps / 1000),
        (f"forgotten: how much worse in {found.row['kept_metric']}", False, found.forgotten),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.9), sharey=True, layout="constrained")
    for axis, (label, log, value) in zip(axes, panels, strict=True):
        points = [(x, line.score, line) for line in found.lines if line.scores and (x := value(line)) is not None]
        _panel(axis, found, known, points, label, log)
    row = found.row
    better = "higher" if found.larger_is_better else "lower"
    axes[0].set_ylabel(f"{row['metric']} on test data ({better} is better)")
    if not found.larger_is_better:
        axes[0].invert_yaxis()
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    quick = ", a quick run" if row["mode"] == "quick" else ""
    seeds = max(len(line.scores) for line in found.lines)
    said = f"mean and spread of {seeds} seeds" if seeds > 1 else "one seed"
    machine = f"{row['gpu'] or row['cpu']}, randlora {row['randlora']}, torch {row['torch']}, peft {row['peft']}"
    figure.suptitle(
        f"{row['task']}{quick}: {said}; numbers at the points: rank; grey line: nothing is better in both\n"
        f"{machine}, commit {row['commit']}, {row['date'][:10]}", fontsize=10,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axis: Axes, found: Summary, known: dict[str, Method], points: list[Point], label: str, log: bool) -> None:
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if found.baseline and found.baseline.scores:
        name = f"{found.baseline.method}: {found.baseline.score:.4g}"
        axis.axhline(found.baseline.score, color="#555555", lw=1, linestyle=":", label=name)
    if not points:
        axis.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#777777")
        return
    if log:
        axis.set_xscale("log")
    front = pareto(points, found.larger_is_better)
    axis.plot([x for x, _, _ in front], [y for _, y, _ in front], color=FRONT, lw=5, alpha=0.6, zorder=1,
              solid_capstyle="round", solid_joinstyle="round", label="Pareto front")  # fmt: skip
    families: dict[str, list[tuple[int | None, Point]]] = {}
    for point in points:
        method = known.get(point[2].method)
        family = method.family if method else point[2].method
        families.setdefault(family, []).append((method.rank if method else None, point))
    for family, members in families.items():
        members.sort(key=lambda member: member[0] or 0)
        color, marker, name = STYLES.get(family, ("#999999", "h", family))
        xs, ys = [p[0] for _, p in members], [p[1] for _, p in members]
        axis.errorbar(xs, ys, yerr=[p[2].spread or 0 for _, p in members], color=color, marker=marker, ms=7, lw=1,
                      elinewidth=1, alpha=0.9, label=name, zorder=3)  # fmt: skip
    _label(axis, [(point, rank, STYLES.get(family, ("#999999",))[0])
                  for family, members in families.items() for rank, point in members if rank is not None])  # fmt: skip


def pareto(points: Sequence[Point], larger_is_better: bool) -> list[Point]:
    """Of points that cost `x` and are worth `y`, those that no other has both cheaper and better; from left to right."""
    sign = -1 if larger_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not front or sign * point[1] < sign * front[-1][1]:
            front.append(point)
    return front


PLACES = ((7, 5), (7, -11), (-7, 5), (-7, -11), (0, 10), (0, -16), (14, 0), (-14, 0))  # in points, best first


def _label(axis: Axes, labels: list[tuple[Point, int, str]]) -> None:
    """Ranks beside their points, each where it is farthest from other points and labels, the first places preferred."""
    axis.figure.canvas.draw()  # which decides where points lie
    to_pixels = axis.transData.transform
    scale = axis.figure.dpi / 72
    taken = [tuple(to_pixels((x, y))) for (x, y, _), _, _ in labels]
    for (x, y, _), rank, color in labels:
        at = to_pixels((x, y))

        def crowd(place: tuple[int, int], at=at) -> float:
            mine = at[0] + place[0] * scale, at[1] + (place[1] + 3) * scale
            return sum(1 / (1 + ((mine[0] - a) ** 2 + (mine[1] - b) ** 2) / (8 * scale) ** 2) for a, b in taken)

        place = min(PLACES, key=lambda place: crowd(place) + 0.02 * PLACES.index(place))
        taken.append((at[0] + place[0] * scale, at[1] + (place[1] + 3) * scale))
        axis.annotate(str(rank), (x, y), place, textcoords="offset points", fontsize=8, color=color, zorder=4,
                      ha="center")  # fmt: skip
