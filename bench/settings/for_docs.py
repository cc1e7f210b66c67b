"""docs/quality-rates.png: how the best learning rate moves with width and rank: `python -m bench.settings.for_docs`."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import ROOT
from bench.settings import table
from bench.settings.book import newest, read

SOURCE = ROOT / "bench" / "results" / "nvidia-h200" / "settings.csv"
TARGET = ROOT / "docs" / "quality-rates.png"
PANELS = (
    ("PEFT's start: alpha = 20 r, gamma at 1/m", lambda c: c.start == "PEFT"),
    ('randlora_alpha="auto"', lambda c: c.start == "rule" and c.gamma == 0.01),
)
COLORS = {128: "#6b9ac4", 384: "#404040", 1024: "#c8102e"}
LINES = {4: "-", 32: "--", 128: ":"}


def main() -> None:
    curves = table.curves(newest(read(SOURCE)))
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), sharey=True, sharex=True, layout="constrained")
    for axis, (title, wanted) in zip(axes, PANELS, strict=True):
        for curve in sorted((c for c in curves if wanted(c.column)), key=lambda c: (c.column.width, c.column.r)):
            column = curve.column
            lost = [min(100 * curve.lost(rate), 1e3) for rate in curve.losses]
            axis.plot(
                list(curve.losses), lost, LINES[column.r], color=COLORS[column.width], marker="o", markersize=3,
                label=f"width {column.width}, r = {column.r}",
            )  # fmt: skip
        axis.set(title=title, xscale="log", xlabel="learning rate", ylim=(-1, 40))
        axis.legend(fontsize=7, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("part of the best gain that is lost, %")
    figure.savefig(TARGET, dpi=120)


if __name__ == "__main__":
    main()
