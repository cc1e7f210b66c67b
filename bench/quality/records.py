"""quality.csv: one row per run. What is there of the same data, model and setting is not run again.

The file is written whole and moved into place after each run: stopping in the middle loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench import records
from bench.quality.methods import methods
from bench.quality.tasks import NAMES

Row = dict[str, str]
PICK, TEST, TIMING = "pick", "test", "timing"

KEY = ("task", "method", "setting", "phase", "rate", "seed", "steps", "device", "precision", "mode", "fingerprint")
VALUES = ("validation_loss", "training_loss", "score", "kept", "trained", "seconds", "ms_per_step", "peak_bytes",
          "failed")  # fmt: skip
# Of the task, so that tables and pictures need nothing but the file.
FACTS = ("metric", "larger_is_better", "kept_metric", "larger_kept_is_better", "untuned", "fingerprint")


@dataclass(frozen=True)
class Facts:
    """What a row says of a :class:`~bench.quality.tasks.Task`."""

    name: str
    steps: int
    metric: str
    larger_is_better: bool
    kept_metric: str
    larger_kept_is_better: bool
    untuned: str
    fingerprint: str

    @classmethod
    def of(cls, task: Any) -> Facts:
        return cls(**{name: getattr(task, name) for name in cls.__dataclass_fields__})

    def columns(self) -> Row:
        return {name: str(getattr(self, name)) for name in FACTS}


class Table:
    """The rows of this machine. `options`: of the command line."""

    def __init__(self, options: Any) -> None:
        self.environment = {"command": options.command} | records.environment(options.device)
        folder = records.machine_folder(options.results, self.environment)
        self.path = folder / "quality.csv"
        (folder / "machine.json").write_text(json.dumps(records.machine(options.device), indent=2) + "\n")
        self.run = {
            "device": torch.device(options.device).type,
            "precision": options.precision,
            "mode": "quick" if options.quick else "full",
        }
        self.about = {"threads": options.threads, "jobs": options.jobs}
        found = records.read(self.path) if self.path.exists() else []
        self.rows = {key_of(row): row for row in found}

    def key(self, case: Mapping[str, Any]) -> tuple[str, ...]:
        return key_of({**case, **self.run})

    def done(self, case: Mapping[str, Any]) -> bool:
        """Whether there is a result; what has failed is tried again."""
        row = self.rows.get(self.key(case))
        return row is not None and not row["failed"]

    def get(self, case: Mapping[str, Any]) -> Row | None:
        return self.rows.get(self.key(case))

    def put(self, case: Mapping[str, Any], facts: Facts, values: Mapping[str, Any]) -> Row:
        whole = {**case, **self.run, **facts.columns(), **values, **self.about, **self.environment}
        row = {name: str(whole.get(name, "")) for name in COLUMNS} | {k: str(v) for k, v in self.environment.items()}
        self.rows[key_of(row)] = row
        if self.path.exists():  # another run may have written meanwhile
            for other in records.read(self.path):
                self.rows.setdefault(key_of(other), other)
        records.write(self.path, records.columns(list(self.rows.values())), self.rows.values())
        return row


COLUMNS = (*KEY, *(name for name in FACTS if name not in KEY), *VALUES, "threads", "jobs")


def key_of(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row.get(name, "")) for name in KEY)


def load(path: Path) -> dict[str, list[Row]]:
    """:func:`newest` of a file, in the order of the tasks; nothing where there is none."""
    found = newest(records.read(path) if path.exists() else [])
    return {name: found[name] for name in dict.fromkeys((*NAMES, *found)) if name in found}


def by_method(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Method -> its rows, in the order of the comparison; of one whose settings have changed since, the newest.

    `rows`: of one task.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    known = list(methods())
    order = sorted(found, key=lambda name: known.index(name) if name in known else len(known))
    return {name: [row for row in found[name] if row["setting"] == found[name][-1]["setting"]] for name in order}


def newest(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Task -> its rows of one device, mode, number of steps and fingerprint: of a full run where there is one, and of
    those the ones that have the latest row.
    """
    groups: dict[str, dict[tuple[str, ...], list[tuple[int, Row]]]] = {}
    for place, row in enumerate(rows):
        which = tuple(row[name] for name in ("mode", "device", "precision", "steps", "fingerprint"))
        groups.setdefault(row["task"], {}).setdefault(which, []).append((place, row))

    def latest(found: list[tuple[int, Row]]) -> tuple[bool, tuple[str, int]]:
        return found[0][1]["mode"] == "full", max((row["date"], place) for place, row in found)

    return {task: [row for _, row in max(found.values(), key=latest)] for task, found in groups.items()}
