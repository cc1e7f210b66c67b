"""Tables and pictures of bench/scaling.py, from its CSV and the file beside it that says what was calculated with."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

from bench import records

Row = dict[str, str]

SHOWN = 64  # GPUs of the table's second column
# Okabe and Ito's colours, which people with any colour vision tell apart. Wide lines lie under narrow ones.
LINES = {
    "DDP": ("#b8bec6", "o", 6.0), "ZeRO-2": ("#000000", "|", 3.5), "FSDP2": ("#0072b2", "s", 2.6),
    "FSDP2 in a node": ("#56b4e9", "D", 1.4), "TP": ("#d55e00", "^", 2.0), "TP x FSDP2": ("#e69f00", "v", 1.4),
    "pipeline": ("#009e73", "x", 1.4),
}  # fmt: skip
FILLS = {
    "weights": "#b8bec6", "buffers": "#e5e8eb", "trained": "#f0e442", "gradients": "#d55e00", "adam": "#009e73",
    "bases": "#0072b2", "activations": "#56b4e9", "workspace": "#cc79a7",
}  # fmt: skip
ONE = "one device"
LIMIT = "#c8102e"
PLAIN = FuncFormatter(lambda value, _: f"{value:g}" if value >= 1 and f"{value:g}"[0] in "125" else "")


def about(path: Path) -> dict[str, Any]:
    return json.loads(path.with_name("computed.json").read_text())


def models(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["model"]].append(row)
    return found


def gibibytes(row: Row) -> float:
    return float(row["total_MiB"]) / 1024


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


# ---- tables ----


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines, of one model: of each engine and method, from how many GPUs on it fits, and what it takes."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    counts = sorted({int(row["gpus"]) for row in rows})
    shown = max((n for n in counts if n <= SHOWN), default=counts[0])
    head = ["engine"]
    for method in methods:
        head += [f"{method}: fits", f"at {shown}"]
    of = {(row["engine"], row["method"], int(row["gpus"])): row for row in rows}
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        line = [engine]
        for method in methods:
            own = [n for n in counts if (row := of.get((engine, method, n))) and row["fits"] == "yes"]
            row = of.get((engine, method, 1 if engine == ONE else shown))
            line.append(_ranges(own, counts))
            line.append(f"{_number(gibibytes(row))} GiB, {_number(float(row['step_ms']) / 1e3)} s" if row else "")
        lines.append(line)
    return head, lines


def _ranges(fits: Sequence[int], counts: Sequence[int]) -> str:
    if not fits:
        return "no"
    first, last = fits[0], fits[-1]
    return f"{first}" if first == last else f"{first} to {last}" if last < counts[-1] else f"from {first}"


def title(rows: Sequence[Row]) -> str:
    """Of one model's table."""
    rank = next((r["lora_rank"] for r in rows if r["lora_rank"]), "")
    return f"{rows[0]['model']}: {setting(rows[0])}" + (f" (LoRA: {rank})" if rank else "")


def setting(row: Row) -> str:
    checkpointed = "" if row["checkpointed"] == "yes" else "not "
    return (
        f"{row['tokens']} tokens per GPU and step in sequences of {row['sequence']}, blocks {checkpointed}checkpointed"
        f", all linear layers, r = {row['r']}"
    )


def numbers_table(said: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What was calculated with."""
    lines = [
        [number["name"], f"{_number(number['value'])} {number['unit']}".strip(),
         "measured" if number["measured"] else "assumed", number["source"]]
        for number in said["numbers"]
    ]  # fmt: skip
    return ["number", "value", "", "where from"], lines


def sections(path: Path, markdown: Callable[[Sequence[str], Iterable[Sequence[str]]], str]) -> list[str]:
    """Of REPORT.md, below the pictures."""
    said = about(path)
    parts = [
        f"**Computed, not measured**, for {said['gpu']} ({said['memory_GiB']} GiB), by `{said['command']}`; rules and "
        'predictions: `bench/NOTES.md`. A step is so many tokens per GPU, whatever the engine. "Fits": from how many '
        f"GPUs on, {said['reserve_GiB']:g} GiB left free; then memory and step time of a GPU of {SHOWN}.  \n"
        f"<sub>randlora {said['randlora']}, torch {said['torch']}; commit {said['commit']}; {said['date'][:10]}</sub>",
    ]
    for rows in models(records.read(path)).values():
        parts += [title(rows), markdown(*table(rows))]
    return [*parts, "Calculated with:", markdown(*numbers_table(said))]


# ---- pictures ----


def draw(path: Path) -> list[Path]:
    """Memory and step time over the number of GPUs, and what takes the memory; a panel per model and method."""
    rows, said = records.read(path), about(path)
    drawn = [
        _lines(path.with_name("scaling-memory.png"), rows, said, "memory per GPU, GiB", gibibytes, fitting=False),
        _lines(path.with_name("scaling-time.png"), rows, said, "seconds per step", _seconds, fitting=True),
    ]
    return [*drawn, _bars(path.with_name("scaling-parts.png"), rows, said)]


def _seconds(row: Row) -> float:
    return float(row["step_ms"]) / 1e3


def _subtitle(said: dict[str, Any]) -> str:
    return f"{said['gpu']}; randlora {said['randlora']}, commit {said['commit']}, {said['date'][:10]}"


def _panels(rows: Sequence[Row], height: float) -> tuple[Any, dict[tuple[str, str], Any]]:
    names, methods = list(models(rows)), list(dict.fromkeys(row["method"] for row in rows))
    size = (4.6 * len(methods), 1.3 + height * len(names))
    figure, axes = plt.subplots(len(names), len(methods), figsize=size, squeeze=False, layout="constrained")
    found = {}
    for name, line in zip(names, axes, strict=True):
        for method, axis in zip(methods, line, strict=True):
            axis.set_title(f"{name}, {method}", fontsize=10, loc="left")
            axis.tick_params(labelsize=8)
            found[name, method] = axis
    return figure, found


def _lines(
    path: Path, rows: Sequence[Row], said: dict[str, Any], label: str, value: Callable[[Row], float], fitting: bool
) -> Path:
    figure, panels = _panels(rows, 2.7)
    handles: dict[str, Any] = {}
    for (name, method), axis in panels.items():
        own = [row for row in rows if (row["model"], row["method"]) == (name, method)]
        if fitting:
            own = [row for row in own if row["fits"] == "yes"]
        one = [row for row in own if row["engine"] == ONE]
        for engine, (color, marker, width) in LINES.items():
            points = [row for row in own if row["engine"] == engine]
            if points and int(points[0]["gpus"]) == 2:
                points = one + points
            if points:
                (handles[engine],) = axis.plot(
                    [int(row["gpus"]) for row in points], [value(row) for row in points], color=color, marker=marker,
                    lw=width, markersize=5, label=engine,
                )  # fmt: skip
        _axes(axis, sorted({int(row["gpus"]) for row in rows}))
        if fitting:
            of_model = [value(row) for row in rows if row["model"] == name and row["fits"] == "yes"]
            axis.set_ylim(0, 1.1 * max(of_model, default=1))
            if not own:
                axis.text(0.5, 0.5, "fits nowhere", ha="center", transform=axis.transAxes)
        else:
            axis.set_yscale("log")
            values = [value(row) for row in rows if row["model"] == name]
            axis.set_ylim(0.8 * min(values), 1.6 * max(*values, *said["memories_GiB"].values()))
            axis.yaxis.set_major_formatter(PLAIN)
            axis.yaxis.set_minor_formatter(PLAIN)
            for gpu, size in said["memories_GiB"].items():
                axis.axhline(size, color=LIMIT, lw=1, linestyle="-" if gpu == said["name"] else ":")
                if method == rows[-1]["method"]:  # beside the last panel, where there are no lines
                    axis.annotate(
                        f"{gpu.upper()}:\n{size} GiB", (1.01, size), xycoords=("axes fraction", "data"), va="center",
                        fontsize=8, color=LIMIT, annotation_clip=False,
                    )  # fmt: skip
    for name in models(rows):
        next(axis for (model, _), axis in panels.items() if model == name).set_ylabel(label, fontsize=9)
    what = "where they fit" if fitting else "whether it fits or not"
    heading = f"Computed, not measured: {label}, {what}\n{setting(rows[0])}; LoRA with as many numbers"
    return _save(figure, path, f"{heading}\n{_subtitle(said)}", handles)


def _axes(axis: Any, counts: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(counts, [str(n) for n in counts])
    axis.minorticks_off()
    axis.set_xlabel("GPUs", fontsize=8)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _bars(path: Path, rows: Sequence[Row], said: dict[str, Any]) -> Path:
    figure, panels = _panels(rows, 2.2)
    counts = sorted({int(row["gpus"]) for row in rows})
    shown = max((n for n in counts if n <= SHOWN), default=counts[0])
    handles: dict[str, Any] = {}
    for (name, method), axis in panels.items():
        own = [row for row in rows if (row["model"], row["method"], int(row["gpus"])) == (name, method, shown)]
        names, left = [row["engine"] for row in own][::-1], [0.0] * len(own)
        for part, color in FILLS.items():
            sizes = [float(row[f"{part}_MiB"]) / 1024 for row in own][::-1]
            handles[part] = axis.barh(names, sizes, left=left, color=color, height=0.7)
            left = [a + b for a, b in zip(left, sizes, strict=True)]
        limit = 1.25 * said["memory_GiB"]
        for y, total in enumerate(left):
            inside = total > 0.85 * limit
            axis.annotate(
                f"{_number(total)} GiB", (min(total, limit), y), (-4 if inside else 4, 0), textcoords="offset points",
                va="center", ha="right" if inside else "left", fontsize=8,
                bbox={"facecolor": "white", "linewidth": 0, "alpha": 0.75, "pad": 0.8},
            )  # fmt: skip
        axis.set_xlim(0, limit)
        axis.axvline(said["memory_GiB"], color=LIMIT, lw=1, zorder=0)
        axis.set_xlabel("GiB per GPU", fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    heading = (
        f"Computed, not measured: what takes the memory of a GPU of {shown}; line: what there is\n{setting(rows[0])}"
    )
    return _save(figure, path, f"{heading}\n{_subtitle(said)}", handles)


def _save(figure: Any, path: Path, heading: str, handles: dict[str, Any]) -> Path:
    figure.suptitle(heading, fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=9)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path
