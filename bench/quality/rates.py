"""What the tried learning rates say: the losses on validation data, and where the best rate of each method lies."""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.quality.methods import KINDS, methods
from bench.quality.records import PICK, Row, by_method
from bench.report_tables import markdown
from bench.settings.table import Curve, one_rate


def curves(rows: Sequence[Row]) -> dict[str, Curve]:
    """Method -> its losses over its rates, as :func:`bench.quality.records.by_method` has the rows of one task.

    What was tried at one rate only is left out.
    """
    found = {}
    for name, own in by_method(rows).items():
        picks = [row for row in own if row["phase"] == PICK and row["validation_loss"]]
        losses = {float(row["rate"]): float(row["validation_loss"]) for row in picks}
        if len(losses) > 1:
            finite = {rate: loss if math.isfinite(loss) else math.inf for rate, loss in sorted(losses.items())}
            found[name] = Curve(name, finite)
    return found


def page(rows: Sequence[Row]) -> str:
    """As Markdown: a table for all methods that were tried at the same rates, and what one rate for our kinds costs."""
    found = curves(rows)
    parts = []
    for rates in dict.fromkeys(tuple(curve.losses) for curve in found.values()):
        head = ["validation loss", *(f"{rate:g}" for rate in rates), "best rate"]
        lines = [
            [name, *(f"{loss:.3f}" for loss in curve.losses.values()), f"{curve.best:.1e}" if curve.bracketed else ""]
            for name, curve in found.items()
            if tuple(curve.losses) == rates
        ]
        parts.append(markdown(head, lines))
    known = methods()
    ours = [curve for name, curve in found.items() if name in known and known[name].family in KINDS]
    inside = [curve for curve in ours if curve.bracketed]
    if len(inside) > 1:
        best, off = one_rate(inside)
        told = (
            f"One rate for {len(inside)} of randlora's {len(ours)}: {best:.1e}, at worst {off:.2f} times off the best."
        )
        if len(inside) < len(ours):
            told += " The others were best at the lowest or the highest rate that was tried."
        parts.append(told)
    return "\n\n".join(parts)
