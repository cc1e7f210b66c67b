"""Pictures of memory over time: a PNG with methods side by side on one scale, and one HTML file to look into."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bench.timeline import ORIGINS, PHASES, Timeline, thin

# Okabe and Ito's colours, which people with any colour vision tell apart; light where much area is expected.
COLORS = {
    "weights": "#b8bec6",
    "bases": "#0072b2",
    "adapter": "#f0e442",
    "optimizer": "#009e73",
    "gradients": "#d55e00",
    "activations": "#56b4e9",
    "workspace": "#cc79a7",
}
TEMPLATE = Path(__file__).with_name("timeline.html")
HTML_BYTES = 400_000
ACROSS = 5  # panels in a row
PNG_POINTS = 4000


def size(count: float) -> str:
    """Bytes for people: "3.2 MiB", "14.1 GiB"."""
    units = ["B", "KiB", "MiB", "GiB"]
    while abs(count) >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.{4 if abs(count) >= 1000 else 3}g} {units[0]}"


# ---- PNG ----


def picture(path: Path, title: str, found: Mapping[str, Timeline | str]) -> Path:
    """Stacked origins over time, a panel per method, all on one scale.

    Args:
        found: method -> its timeline, or the reason why there is none.
    """
    across = min(ACROSS, len(found))
    down = -(-len(found) // across)
    area = (max(7.0, 3.5 * across), 0.9 + 4.6 * down)
    figure, axes = plt.subplots(down, across, figsize=area, squeeze=False, sharey=True, layout="constrained")
    top = max((int(t.total.max()) for t in found.values() if isinstance(t, Timeline)), default=1)
    unit, word = (2**30, "GiB") if top >= 2**30 else (2**20, "MiB")
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, (name, timeline) in zip(axes.flat, found.items(), strict=False):
        axis.set_title(name, fontsize=10, fontweight="bold" if name.startswith("randlora") else "normal")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        if isinstance(timeline, str):
            axis.text(0.5, 0.5, _wrapped(timeline, 26), transform=axis.transAxes, ha="center", va="center", fontsize=9)
            axis.set_xticks([])
        else:
            _panel(axis, timeline, top)
    for axis in axes[:, 0]:
        axis.set_ylim(0, 1.22 * top)
        axis.yaxis.set_major_locator(_BinaryTicks(unit))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y / unit:g}"))
        axis.set_ylabel(word)
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[origin]) for origin in ORIGINS]
    figure.legend(handles, ORIGINS, loc="outside lower center", ncols=len(ORIGINS), fontsize=9, frameon=False)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


class _BinaryTicks(MaxNLocator):
    """Round numbers of a unit, not of bytes."""

    def __init__(self, unit: int) -> None:
        super().__init__(nbins=7, steps=[1, 2, 2.5, 5, 10])
        self.unit = unit

    def tick_values(self, vmin: float, vmax: float) -> np.ndarray:
        return super().tick_values(vmin / self.unit, vmax / self.unit) * self.unit


def _panel(axis, timeline: Timeline, top: int) -> None:
    end = timeline.steps[-1].end
    shown, _ = thin(timeline, PNG_POINTS)
    times = np.append(shown.time, max(end, shown.time[-1])) / 1e6
    stack = np.vstack([shown.bytes, shown.bytes[-1:]]).cumsum(1)
    low = np.zeros(len(times))
    for i, origin in enumerate(ORIGINS):
        axis.fill_between(times, low, stack[:, i], step="post", color=COLORS[origin], linewidth=0)
        low = stack[:, i]
    for step in timeline.steps:
        for name, start, stop in zip(PHASES, step[:3], step[1:4], strict=True):
            axis.axvline(start / 1e6, color="#222222", lw=0.6, ls="-" if name == "forward" else (0, (2, 3)), alpha=0.7)
            if stop - start > 0.12 * end:
                axis.text(
                    (start + stop) / 2e6, 0.985, name, transform=axis.get_xaxis_transform(),
                    ha="center", va="top", fontsize=7, color="#444444",
                )  # fmt: skip
    at, total = timeline.time[timeline.peak] / 1e6, int(timeline.total[timeline.peak])
    right = at > end / 2e6
    axis.plot([at], [total], "v", color="#111111", markersize=5, clip_on=False)
    axis.annotate(
        size(total), (at, total), (-3 if right else 3, 5), textcoords="offset points",
        ha="right" if right else "left", va="bottom", fontsize=9, fontweight="bold",
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1},
    )  # fmt: skip
    axis.set_xlim(0, end / 1e6)
    parts = [(origin, int(b)) for origin, b in zip(ORIGINS, timeline.bytes[timeline.peak], strict=True)]
    lines = [f"{origin:<11} {size(b):>9}" for origin, b in reversed(parts)]
    phase = timeline.phase(timeline.peak)
    axis.set_xlabel(
        "ms, two steps under the profiler\n\n" + f"at the peak ({phase})\n".replace(" ()", "") + "\n".join(lines),
        fontsize=7.5, family="monospace",
    )  # fmt: skip


def _wrapped(text: str, width: int) -> str:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return "\n".join([*lines, line])


# ---- HTML ----


def page(path: Path, title: str, subtitle: str, found: Mapping[str, Timeline | str]) -> Path:
    """One file that needs nothing else: its data and its program are inside. At most `HTML_BYTES`."""
    limit = 4000
    while True:
        data = page_data(title, subtitle, found, limit)
        text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
        whole = TEMPLATE.read_text().replace("TITLE", html.escape(title), 1).replace("/*DATA*/null", text, 1)
        if len(whole.encode()) <= HTML_BYTES or limit <= 8:
            break
        limit //= 2
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(whole)
    return path


def page_data(title: str, subtitle: str, found: Mapping[str, Timeline | str], limit: int) -> dict[str, Any]:
    """What the page's program reads: times in us and bytes in KiB, each as the difference to the value before it."""
    methods = []
    for name, timeline in found.items():
        if isinstance(timeline, str):
            continue
        shown, error = thin(timeline, limit)
        peak = timeline.peak
        methods.append(
            {
                "name": name,
                "time": _differences(shown.time // 1000),
                "bytes": [_differences((column + 512) // 1024) for column in shown.bytes.T],
                "steps": [[t // 1000 for t in step[:4]] for step in timeline.steps],
                "peak": {"time": int(timeline.time[peak]) // 1000, "bytes": timeline.bytes[peak].tolist()},
                "merged": error,
            }
        )
    failed = [[name, reason] for name, reason in found.items() if isinstance(reason, str)]
    return {
        "title": title,
        "subtitle": subtitle,
        "origins": ORIGINS,
        "colors": [COLORS[origin] for origin in ORIGINS],
        "phases": PHASES,
        "methods": methods,
        "failed": failed,
    }


def _differences(values: Sequence[int]) -> list[int]:
    return np.diff(values, prepend=0).tolist()
