"""Pictures of quality.csv, one per task: the score over trained numbers, over seconds and over what is forgotten.

What diverged is not in them; the tables say so.

The number in a point is the rank. Joined in grey is what nothing else beats in both: the Pareto front. Hollow points
are of learning rates that were tested and not picked, but for those that are worse than the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.quality.methods import FULL, Method, methods
from bench.quality.records import load
from bench.quality.summary import Line, Summary, summary

# family -> colour, marker, name in the legend. Square: what was there; round: RandLoRA.
STYLES = {
    FULL: ("#1a1a1a", "D", "full fine-tuning"),
    "PEFT LoRA": ("#1f6fb4", "s", "PEFT LoRA"),
    "PEFT rsLoRA": ("#56a8d8", "s", "PEFT rsLoRA"),
    "PEFT DoRA": ("#123f6b", "s", "PEFT DoRA"),
    "PEFT RandLoRA": ("#7a7a7a", "o", "PEFT RandLoRA"),
    "dense": ("#c8102e", "o", "randlora dense"),
    "hadamard": ("#e07b1f", "o", "randlora hadamard"),
    "sparse": ("#8c2d82", "o", "randlora sparse"),
    "very_sparse": ("#2f8f5b", "o", "randlora very_sparse"),
}
OTHER = ("#999999", "h")
FRONT = "#b9c7b0"
DODGE = {"dense": 0.84, "hadamard": 0.95, "sparse": 1.07, "very_sparse": 1.2}
Point = tuple[float, float, Line]


def draw(path: Path) -> list[Path]:
    """A picture of every task that has results."""
    known = methods()
    drawn = []
    for task, rows in load(path).items():
        found = summary(rows)
        if any(line.finite for line in found.lines):
            drawn.append(picture(path.with_name(f"quality-{task}.png"), found, known))
    return drawn


def picture(path: Path, found: Summary, known: dict[str, Method]) -> Path:
    steps = int(found.row["steps"])
    panels: list[tuple[str, bool, Callable[[Line], float | None]]] = [
        ("trained numbers (equal ones side by side)", True, lambda line: line.trained),
        (f"seconds of training, {steps} steps", False, lambda line: line.ms and line.ms * steps / 1000),
        (f"forgotten: how much worse in {found.row['kept_metric']}", False, found.forgotten),
    ]
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.6), sharey=True, layout="constrained")
    low, high = _limits(found)
    axes[0].set_ylim((low, high) if found.larger_is_better else (high, low))
    for axis, (label, log, value) in zip(axes, panels, strict=True):
        points = [(x, line.score, line) for line in found.lines
                  if line.finite and (x := value(line)) is not None and math.isfinite(x)]  # fmt: skip
        aside = [(x, other.score, other) for other in _aside(found)
                 if (x := value(other)) is not None and math.isfinite(x)]  # fmt: skip
        _panel(axis, found, known, points, aside, label, log)
    row = found.row
    better = "higher" if found.larger_is_better else "lower"
    axes[0].set_ylabel(f"{row['metric']} on test data ({better} is better)")
    named = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    names = [name for _, _, name in STYLES.values() if name in named]
    names += [name for name in named if name not in names]
    figure.legend(
        [named[name] for name in names], names, loc="outside lower center", ncols=6, frameon=False, fontsize=9
    )
    quick = ", a quick run" if row["mode"] == "quick" else ""
    rates = sorted({other.rate for other in _aside(found)}, key=float)
    hollow = f"; hollow: at {', '.join(f'{float(rate):g}' for rate in rates)}, not picked" if rates else ""
    seeds = max(len(line.scores) for line in found.lines)
    said = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    machine = f"{found.machine}, randlora {row['randlora']}, torch {row['torch']}, peft {row['peft']}"
    figure.suptitle(
        f"{row['task']}{quick}: {said}; number in a point: rank{hollow}\n"
        f"{machine}, commit {row['commit']}, {row['date'][:10]}", fontsize=10,
    )  # fmt: skip
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(
    axis: Axes, found: Summary, known: dict[str, Method], points: list[Point], aside: list[Point], label: str, log: bool
) -> None:  # fmt: skip
    """`aside`: at learning rates that were not picked."""
    axis.set_xlabel(label)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if found.baseline and found.baseline.scores:
        name = f"{found.baseline.method}: {found.baseline.score:.4g}"
        low, high = sorted(axis.get_ylim())
        if low < found.baseline.score < high:
            axis.axhline(found.baseline.score, color="#555555", lw=1, linestyle=":", label=name)
        else:
            above = (found.baseline.score > high) == found.larger_is_better
            text = f"{name}, {'above' if above else 'below'} this picture"
            axis.annotate(text, (0.02, 0.02), xycoords="axes fraction", fontsize=8, color="#555555")
    if not points:
        axis.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", color="#777777")
        return
    if log:
        axis.set_xscale("log")

    def placed(point: Point) -> tuple[str, int | None, Point]:
        """Family, rank, and where it is drawn: the kinds train equally many numbers."""
        x, y, line = point
        method = known.get(line.method)
        family = method.family if method else line.method
        return family, method.rank if method else None, (x * DODGE.get(family, 1) if log else x, y, line)

    families: dict[str, list[tuple[int | None, Point]]] = {}
    for family, rank, drawn in map(placed, points):
        families.setdefault(family, []).append((rank, drawn))
    for family, rank, (x, y, _) in map(placed, aside):
        color, marker, _ = STYLES.get(family, (*OTHER, family))
        axis.plot(x, y, marker, ms=12 if marker == "o" else 9, color=color, markerfacecolor="white",
                  markeredgewidth=1.2, zorder=2.5)  # fmt: skip
        axis.annotate("" if rank is None else str(rank), (x, y), color=color, fontsize=5.5, ha="center", va="center",
                      zorder=2.6)  # fmt: skip
    best = {id(line) for _, _, line in pareto(points, found.larger_is_better)}
    shown = [point for members in families.values() for _, point in members]
    front = sorted((point for point in shown if id(point[2]) in best), key=lambda point: point[0])
    axis.plot([x for x, _, _ in front], [y for _, y, _ in front], color=FRONT, lw=9, marker="o", ms=21, alpha=0.5,
              markeredgewidth=0, zorder=1, solid_joinstyle="round", label="nothing is better in both")  # fmt: skip
    for family, members in families.items():
        members.sort(key=lambda member: member[0] or 0)
        color, marker, name = STYLES.get(family, (*OTHER, family))
        xs, ys = [p[0] for _, p in members], [p[1] for _, p in members]
        axis.plot(xs, ys, color=color, lw=0.8, alpha=0.4, zorder=2)
        axis.errorbar(xs, ys, yerr=[p[2].spread or 0 for _, p in members], color=color, marker=marker,
                      ms=14 if marker == "o" else 11, markeredgecolor="white", markeredgewidth=0.7, linestyle="none",
                      elinewidth=0.9, label=name, zorder=3)  # fmt: skip
        for rank, (x, y, _) in members:
            text = "" if rank is None else str(rank)
            axis.annotate(text, (x, y), color="white", fontsize=6.5 if len(text) < 3 else 5.5, fontweight="bold",
                          ha="center", va="center", zorder=4)  # fmt: skip


def _limits(found: Summary) -> tuple[float, float]:
    """Of the scores' axis: all methods, and the baseline where it does not press them together."""
    drawn = [*(line for line in found.lines if line.finite), *_aside(found)]
    scores = [score for line in drawn for score in line.scores]
    low, high = min(scores), max(scores)
    span = max(high - low, 1e-3 * abs(high))
    if found.baseline and found.baseline.scores and low - span < found.baseline.score < high + span:
        low, high = min(low, found.baseline.score), max(high, found.baseline.score)
    return low - 0.1 * span, high + 0.1 * span


def _aside(found: Summary) -> list[Line]:
    """What is drawn of rates that were not picked."""
    sign = 1 if found.larger_is_better else -1
    worst = sign * found.baseline.score if found.baseline and found.baseline.scores else -math.inf
    others = [other for line in found.lines for other in line.others]
    return [other for other in others if other.finite and sign * other.score > worst]


def pareto(points: Sequence[Point], larger_is_better: bool) -> list[Point]:
    """Of points that cost `x` and are worth `y`, those that no other beats in both; from left to right."""
    sign = -1 if larger_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], sign * p[1])):
        if not front or sign * point[1] < sign * front[-1][1]:
            front.append(point)
    return front
