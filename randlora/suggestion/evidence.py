"""What methods were measured to be worth, as data: the rows that a suggestion rests on, and what follows from them.

:data:`ROWS` repeats test results of ``python -m bench quality`` for those who have the package without the repository.
Each row names the file that it comes from, and a test compares the two. Where there is no row, nothing is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LORA = "PEFT LoRA"
BASELINES = ("best head", "untuned")  # methods that train no adapter: where every adapter starts


@dataclass(frozen=True)
class Row:
    """A method on a task: mean and spread of its seeds on test data.

    Attributes:
        task: as ``python -m bench quality`` calls it. metric: what `score` is: ``"accuracy"``, ``"MRR"`` ...
        larger_is_better: whether more of it is better.
        method: ``"hadamard r=32"``, ``"PEFT LoRA r=8"`` ..., or one of :data:`BASELINES`.
        score: mean over seeds. spread: the largest less the smallest.
        source: the CSV file, as a path in the repository.
    """

    task: str
    metric: str
    larger_is_better: bool
    method: str
    score: float
    spread: float
    source: str


# Nothing by hand: a row stands in its source, and tests/suggestion/test_evidence.py looks it up there.
ROWS: tuple[Row, ...] = ()


def gain(method: str, rows: Sequence[Row]) -> float | None:
    """The mean over tasks of the share that `method` has of what the best method there gained over the baseline.

    1: it is the best on every task; 0: it gained nothing; negative: it lost. None: it was measured on no task that has
    a baseline, too, and a method that gained something over it.
    """
    shares = []
    for row in (row for row in rows if row.method == method):
        same = [r for r in rows if r.task == row.task]
        starts = [r.score for r in same if r.method in BASELINES]
        if not starts:
            continue
        sign = 1 if row.larger_is_better else -1
        start = max(sign * score for score in starts)
        best = max(sign * r.score for r in same) - start
        if best > 0:
            shares.append((sign * row.score - start) / best)
    return sum(shares) / len(shares) if shares else None


def about(methods: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """The rows of these methods, and the baselines of their tasks."""
    tasks = {row.task for row in rows if row.method in methods}
    return [row for row in rows if row.task in tasks and (row.method in methods or row.method in BASELINES)]
