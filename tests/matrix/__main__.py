"""Runs rows of the matrix and writes down what came of them.

    make matrix                            all rows, then the table of docs/versions.md
    make matrix ROWS="peft-0.16 newest"    these
    make matrix PEFT_MAIN=../peft ROWS=peft-main    PEFT's main from a folder

A row that ran before, with a build for its PyTorch, takes as long as its tests. What was written down is kept by the
name of the row: a run takes the place of the last one.
"""

from __future__ import annotations

import datetime
import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matrix.environments import Impossible, describe, git, prepare
from matrix.records import add
from matrix.rows import Row, choose
from matrix.trials import TESTS, attempt

WRITTEN = ("tests/matrix/results.jsonl", "docs/versions.md")  # by the matrix


def run(row: Row) -> bool:
    say(f"{row.name}: Python {row.python}, {', '.join(row.requirements.values())}")
    try:
        folder = prepare(row)
    except Impossible as error:
        say(f"{row.name}: not run, as {error}")
        return False
    code = commit()
    outcome = attempt(folder / "bin" / "python", TESTS)
    record = {
        "row": row.name,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes"),
        "machine": platform.machine(),
        "randlora": code,
        **describe(folder),
        **outcome.as_dict(),
    }
    add(record)
    say(f"{row.name}: {outcome}")
    return outcome.is_good


def commit() -> str | None:
    """Of the checkout, marked where files are changed, but for those that rows before this one have written."""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *(f":!{path}" for path in WRITTEN))
    return git("describe", "--always", "--exclude=*", *(["--dirty"] if changed else []))


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def main(names: list[str]) -> int:
    bad = [row.name for row in choose(names) if not run(row)]
    if bad:
        say(f"Not as it should be: {', '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
