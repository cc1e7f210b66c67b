"""settings.csv: a row per point, with all that it depends on. Written whole and moved into place after each point."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.settings.points import Column, Point

COLUMN = tuple(field.name for field in dataclasses.fields(Column))
KEY = (*COLUMN, "lr", "seed", "steps", "device", "precision", "mode")
Row = dict[str, str]


class Book:
    """The rows of this machine. `options`: of the command line."""

    def __init__(self, options: Any) -> None:
        self.environment = {"command": options.command} | records.environment(options.device)
        folder = records.machine_folder(options.results, self.environment)
        (folder / "machine.json").write_text(json.dumps(records.machine(options.device), indent=2) + "\n")
        self.path = folder / "settings.csv"
        self.run = {
            "device": torch.device(options.device).type,
            "precision": options.precision,
            "mode": "quick" if options.quick else "full",
        }
        self.rows = {key_of(row): row for row in read(self.path)}

    def loss(self, point: Point, fingerprint: str) -> float | None:
        """Of a point that was measured on the data and model of this fingerprint; infinite where it diverged."""
        row = self.rows.get(key_of(self._case(point)))
        return None if row is None or row["failed"] or row["fingerprint"] != fingerprint else loss_of(row)

    def of(self, columns: Iterable[Column], steps: int) -> list[Row]:
        """The rows of these curves as they are measured now: device, precision, mode, number of steps."""
        asked, now = set(columns), self.run | {"steps": str(steps)}
        return [
            row
            for row in self.rows.values()
            if column_of(row) in asked and all(row[name] == value for name, value in now.items())
        ]

    def put(self, point: Point, found: dict[str, Any]) -> None:
        row = self._case(point) | {"failed": ""} | found | self.environment
        row = {name: str(value) for name, value in row.items()}
        self.rows[key_of(row)] = row
        for other in read(self.path):  # another run may have written meanwhile
            self.rows.setdefault(key_of(other), other)
        columns = dict.fromkeys(name for row in self.rows.values() for name in row)
        records.write(self.path, columns, self.rows.values())

    def _case(self, point: Point) -> dict[str, Any]:
        run = {"lr": f"{point.lr:g}", "seed": point.seed, "steps": point.steps}
        return dataclasses.asdict(point.column) | run | self.run


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def newest(rows: Iterable[Row]) -> list[Row]:
    """Of each task those of a full run, where there is one, and of the device, precision and number of steps that were
    measured last; of each of its models those of the data that were measured last.
    """
    for which, of in ((("mode", "device", "precision", "steps"), ("task",)), (("fingerprint",), ("task", "width"))):
        last: dict[tuple[str, ...], tuple[tuple[bool, str], tuple[str, ...]]] = {}
        rows = list(rows)
        for row in rows:
            key, said = tuple(row[name] for name in of), tuple(row[name] for name in which)
            age = row["mode"] == "full", row["date"]
            if not row["failed"] and (key not in last or age >= last[key][0]):
                last[key] = age, said
        rows = [
            row
            for row in rows
            if (key := tuple(row[name] for name in of)) in last and last[key][1] == tuple(row[name] for name in which)
        ]
    return list(rows)


def read(path: Path) -> list[Row]:
    return records.read(path) if path.exists() else []


def loss_of(row: Row) -> float:
    loss = float(row["loss"])
    return loss if math.isfinite(loss) else math.inf


def column_of(row: Row) -> Column:
    kinds = {"task": str, "start": str, "kind": str, "width": int, "r": int, "num_bases": int}
    return Column(**{name: kinds.get(name, float)(row[name]) for name in COLUMN})
