"""What the rows say: the best rate of each curve, and what one rate for all of them costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.settings.book import Row, column_of, loss_of, newest, read
from bench.settings.points import Column


@dataclass
class Curve:
    """Losses over learning rates; `before`: the loss of the untuned model. Means over seeds.

    `column`: what it is of, a :class:`Column` but where others use this.
    """

    column: Any
    losses: dict[float, float]
    before: float = math.nan

    @property
    def best(self) -> float:
        """The best rate: where a parabola over log(rate) through the best three has its lowest point."""
        rates = sorted(self.losses)
        i = min(range(len(rates)), key=lambda i: self.losses[rates[i]])
        if i in (0, len(rates) - 1):
            return rates[i]
        x = [math.log2(rate) for rate in rates[i - 1 : i + 2]]
        y = [self.losses[rate] for rate in rates[i - 1 : i + 2]]
        if not all(map(math.isfinite, y)):
            return rates[i]
        left, right = (y[1] - y[0]) / (x[1] - x[0]), (y[2] - y[1]) / (x[2] - x[1])
        bend = (right - left) / (x[2] - x[0])
        return 2.0 ** ((x[0] + x[1]) / 2 - left / (2 * bend)) if bend > 0 else rates[i]

    @property
    def lowest(self) -> float:
        return min(self.losses.values())

    @property
    def bracketed(self) -> bool:
        """Whether worse rates are known on both sides of the best."""
        rates = sorted(self.losses)
        return self.losses[rates[0]] > self.lowest < self.losses[rates[-1]]

    def at(self, rate: float) -> float | None:
        """The loss at a rate, between measured ones on a straight line over log(rate); None beyond them."""
        rates = sorted(self.losses)
        if not rates[0] <= rate <= rates[-1]:
            return None
        high = next(i for i, known in enumerate(rates) if known >= rate)
        if rates[high] == rate:
            return self.losses[rate]
        a, b = rates[high - 1], rates[high]
        part = math.log(rate / a) / math.log(b / a)
        return (1 - part) * self.losses[a] + part * self.losses[b]

    def lost(self, rate: float) -> float | None:
        """Which part of what the best rate gains over the untuned model is lost at this one."""
        loss = self.at(rate)
        return None if loss is None else (loss - self.lowest) / max(self.before - self.lowest, 1e-12)


def curves(rows: Sequence[Row]) -> list[Curve]:
    """In the order of the rows; points that failed are left out."""
    found: dict[Column, dict[float, list[Row]]] = {}
    for row in rows:
        if not row["failed"]:
            found.setdefault(column_of(row), {}).setdefault(float(row["lr"]), []).append(row)
    return [
        Curve(
            column,
            {rate: _mean([loss_of(row) for row in same]) for rate, same in sorted(rates.items())},
            _mean([float(row["before"]) for same in rates.values() for row in same]),
        )
        for column, rates in found.items()
    ]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def one_rate(found: Sequence[Curve]) -> tuple[float, float]:
    """The rate that is nearest to the best ones of all curves, and by which factor it is off at worst."""
    logs = [math.log(curve.best) for curve in found]
    return math.exp((min(logs) + max(logs)) / 2), math.exp((max(logs) - min(logs)) / 2)


def text(rows: Sequence[Row]) -> str:
    """A line per curve: its losses by rate, its best rate; then, for each start, what one rate for all costs."""
    found = curves(rows)
    if not found:
        return "nothing has been measured"
    rates = sorted({rate for curve in found for rate in curve.losses})
    width = max(len(str(curve.column)) for curve in found)
    lines = [" " * width + " before " + "".join(f"{rate:>9.3g}" for rate in rates) + "   best rate"]
    for curve in sorted(found, key=lambda c: (c.column.task, c.column.start, c.column.width, c.column.r)):
        cells = (f"{curve.losses[rate]:9.4f}" if rate in curve.losses else " " * 9 for rate in rates)
        end = f"{curve.best:.2e}" + ("" if curve.bracketed else " or beyond")
        lines.append(f"{curve.column!s:{width}} {curve.before:6.4f} {''.join(cells)}   {end}")
    for start, group in grouped(found).items():
        if len(group) < 2:
            continue
        best, off = one_rate(group)
        lost = [part for curve in group if (part := curve.lost(best)) is not None]
        lines.append(
            f"{start}: {len(group)} curves; one rate for all: {best:.2e}, at worst {off:.2f} x from the best"
            + (f", at worst {max(lost):.1%} of the gain lost, {_mean(lost):.1%} on average" if lost else "")
        )
    return "\n".join(lines)


def sections(path: Path) -> list[str]:
    """Of the report: the same, of what was measured last."""
    rows = newest(read(path))
    if not rows:
        return []
    said = (
        f"{rows[-1]['command']}; {rows[-1]['gpu'] or rows[-1]['cpu']}, commit {rows[-1]['commit']}, {rows[-1]['date']}"
    )
    return [said, f"```text\n{text(rows)}\n```"]


def grouped(found: Sequence[Curve]) -> Mapping[str, list[Curve]]:
    """Curves by what is claimed to need one rate: a task, a start with its gain and gamma, a factor of gamma's rate."""
    groups: dict[str, list[Curve]] = {}
    for curve in found:
        column = curve.column
        name = f"{column.task}, {column.start}"
        name += f" G={column.gain:g} g={column.gamma:g}" if column.start == "rule" else ""
        name += f", gamma's rate x{column.gamma_factor:g}" if column.gamma_factor != 1 else ""
        groups.setdefault(name, []).append(curve)
    return groups
