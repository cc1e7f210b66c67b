"""settings.csv: a row per point, with all that it depends on. Written whole and moved into place after each point."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.settings.points import Column, Point

COLUMN = tuple(field.name for field in dataclasses.fields(Column))
KEY = (*COLUMN, "lr", "seed", "steps", "device", "mode")
Row = dict[str, str]


class Book:
    """The rows of this machine. `options`: of the command line."""

    def __init__(self, options: Any) -> None:
        self.environment = {"command": options.command} | records.environment(options.device)
        folder = records.machine_folder(options.results, self.environment)
        (folder / "machine.json").write_text(json.dumps(records.machine(options.device), indent=2) + "\n")
        self.path = folder / "settings.csv"
        self.run = {"device": torch.device(options.device).type, "mode": "quick" if options.quick else "full"}
        self.rows = {key_of(row): row for row in read(self.path)}

    def loss(self, point: Point) -> float | None:
        """Of a point that was measured; infinite where it diverged."""
        row = self.rows.get(self._key(point))
        return None if row is None or row["failed"] else loss_of(row)

    def put(self, point: Point, found: dict[str, Any]) -> None:
        row = self._case(point) | {"failed": ""} | found | self.environment
        row = {name: str(value) for name, value in row.items()}
        self.rows[key_of(row)] = row
        columns = dict.fromkeys(name for row in self.rows.values() for name in row)
        partial = self.path.with_suffix(".csv.part")
        records.write(partial, columns, self.rows.values())
        partial.replace(self.path)

    def _case(self, point: Point) -> dict[str, Any]:
        run = {"lr": f"{point.lr:g}", "seed": point.seed, "steps": point.steps}
        return dataclasses.asdict(point.column) | run | self.run

    def _key(self, point: Point) -> tuple[str, ...]:
        return key_of(self._case(point))


def key_of(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def read(path: Path) -> list[Row]:
    return records.read(path) if path.exists() else []


def loss_of(row: Row) -> float:
    loss = float(row["loss"])
    return loss if math.isfinite(loss) else math.inf


def column_of(row: Row) -> Column:
    kinds = {"task": str, "start": str, "kind": str, "width": int, "r": int, "num_bases": int}
    return Column(**{name: kinds.get(name, float)(row[name]) for name in COLUMN})
