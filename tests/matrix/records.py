"""What was run, when, and what came of it: a line of JSON for each row of the matrix, in `results.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

from matrix.rows import ROWS, Row

RESULTS = Path(__file__).with_name("results.jsonl")


def read(path: Path | None = None) -> list[dict]:
    """Of this file, or of the committed one, in the order of the rows. One that the matrix has no more is left out."""
    path = path or RESULTS
    lines = path.read_text().splitlines() if path.is_file() else []
    found = {record["row"]: record for record in map(json.loads, lines)}
    return [found[row.name] for row in ROWS if row.name in found]


def add(*records: dict) -> None:
    """Each takes the place of an older one of its row."""
    last = {record["row"]: record for record in sorted([*read(), *records], key=lambda record: record["date"])}
    lines = [json.dumps(last[row.name]) for row in ROWS if row.name in last]
    RESULTS.write_text("".join(f"{line}\n" for line in lines))


def fits(record: dict, row: Row) -> bool:
    """Whether the row still asks for the versions of this record: what it pins may have changed since."""
    pins = {"torch": row.torch, "transformers": row.transformers, "peft": row.peft, "torchao": row.torchao}
    same = all(record[name].partition("+")[0] == pin for name, pin in pins.items() if pin not in ("", "main"))
    return same and record["python"].startswith(f"{row.python}.")
