"""What methods were measured to be worth, and what follows from it for a suggestion.

:data:`randlora.suggestion.rows.ROWS` repeats the test results of ``python -m bench quality``, for those who have the
package without the repository. Each row names the file that it comes from. Where there is no row, nothing is claimed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LORA = "PEFT LoRA"


@dataclass(frozen=True)
class Row:
    """A method on a task, on all linear layers of a model: mean and spread of its seeds on test data.

    Attributes:
        task: as ``python -m bench quality`` calls it. metric: what `score` is: ``"accuracy"``, ``"MRR"`` ...
        larger_is_better: whether more of it is better.
        method: ``"hadamard r=32"``, ``"PEFT LoRA r=8"`` ... baseline: whether it is where all others start.
        rate: the learning rate, picked on validation data; None for the baseline.
        score: mean over `seeds`; None: it diverged. spread: standard deviation; None where there is one seed.
        source: the CSV file, as a path in the repository.
    """

    task: str
    metric: str
    larger_is_better: bool
    method: str
    baseline: bool
    rate: float | None
    score: float | None
    spread: float | None
    seeds: int
    source: str


def gains(method: str, rows: Sequence[Row]) -> tuple[float, ...]:
    """For each task the share that `method` has of what the best method there gained over the baseline.

    1: it is the best; 0: it gained nothing, or diverged; negative: it lost. Of tasks that it was measured on, and that
    have a baseline and a method that gained something over it.
    """
    shares: list[float] = []
    for row in (row for row in rows if row.method == method):
        same = [r for r in rows if r.task == row.task]
        if (start := next((_good(r) for r in same if r.baseline), -math.inf)) > -math.inf:
            best = max(map(_good, same)) - start
            own = start if row.score is None else _good(row)
            shares += [(own - start) / best] if best > 0 else []
    return tuple(shares)


def about(methods: Sequence[str], rows: Sequence[Row]) -> list[Row]:
    """The rows of these methods, and of their tasks what a gain is counted from and to: baseline and best method."""
    found: list[Row] = []
    for task in dict.fromkeys(row.task for row in rows if row.method in methods):
        same = [row for row in rows if row.task == task]
        best = max(same, key=_good)
        found += [row for row in same if row.method in methods or row.baseline or row is best]
    return found


def _good(row: Row) -> float:
    if row.score is None:
        return -math.inf
    return row.score if row.larger_is_better else -row.score
