"""The rule by which one candidate is suggested, and what it says of LoRA."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .budget import Budget
from .candidates import Candidate
from .prices import price

ENOUGH = 0.9  # of the best gain that was measured: a smaller difference is what another seed makes
RANK = 32  # PEFT's, where no measurement speaks for another
FIT = ("hadamard", "dense", "sign")  # bases that can fit any matrix as well as others: bench/results, fit.csv


@dataclass(frozen=True)
class Choice:
    """What is suggested and why, and what that is beside LoRA. `take_lora`: LoRA is the better choice."""

    candidate: Candidate
    reason: str
    about_lora: str
    take_lora: bool


def choose(candidates: Sequence[Candidate], budget: Budget) -> Choice:
    """One of the candidates that are not LoRA:

    1. What exceeds the budget's limit is left out.
    2. If any of the rest was measured, what was not, or on fewer tasks than others, or has less than ENOUGH of their
       best gain, is left out. Otherwise kinds that fit worse than others are.
    3. Of these it is the one that takes the least of the budget's quantity. With a limit, or with no budget, it is the
       least product of all three quantities; but where nothing was measured, the usual rank on the usual layers.

    Raises:
        ValueError: nothing is within the limit.
    """
    own = [c for c in candidates if c.kind is not None]
    within = [c for c in own if budget.allows(c)]
    if not within:
        least = min(own, key=budget.amount)
        lora = [f"; {c.method} on {c.targets} is" for c in candidates if budget.allows(c)]
        raise ValueError(
            f"no candidate is within budget={str(budget)!r}: the least is {price(least, budget.quantity)}, with "
            f"{least.method} on {least.targets}; higher ranks and fewer layers take less" + "".join(lora[:1])
        )
    tasks = max(len(c.gains) for c in within)  # averages over other tasks are not to be compared
    measured = _measured(within, tasks)
    best = max((gain for _, gain in measured), default=None)
    inside = "" if budget.limit is None else f" within {budget}"
    unknown = "no quality was measured" + " on these layers alone" * all(c.targets.few for c in within)
    if best is not None:
        good = [c for c, gain in measured if gain >= _enough(best)]
        judge = budget if budget.limit is None else Budget()
        found = min(good, key=_least_of(judge))
        what = price(found, judge.quantity) if judge.quantity else "numbers, memory and time together"
        if best > 0:
            reason = (
                f"of what was measured{inside}, and gained at least {ENOUGH:.0%} of what the best of these did, it "
                f"takes the least: {what}. On average it gained {found.gain:.0%} of what the best of all methods did"
            )
        else:
            reason = f"nothing that was measured{inside} gained anything, and this lost the least; it takes {what}"
    elif budget.quantity is not None and budget.limit is None:
        found = min([c for c in within if c.kind in FIT] or within, key=_least_of(budget))
        reason = f"{unknown}, so that the cost alone decides: {price(found, budget.quantity)} is the least"
    else:
        found = min(within, key=_unusual)
        usual = "Hadamard bases, which fit what dense ones do" if found.kind == FIT[0] else f"{found.kind} bases"
        rank = f"r = {RANK}, as in PEFT" if found.r == RANK else f"the rank nearest to PEFT's {RANK}"
        reason = f"{unknown}, so that it is the usual choice{inside}: {usual}, and {rank}"
    others = [c for c in candidates if c.kind is None and c.targets == found.targets and budget.allows(c)]
    return Choice(found, reason, *_beside_lora(found, best, others, Budget(budget.quantity).amount))


def _measured(candidates: Sequence[Candidate], tasks: int) -> list[tuple[Candidate, float]]:
    """Those that were measured on so many tasks, and their gains."""
    return [(c, c.gain) for c in candidates if c.gain is not None and len(c.gains) == tasks]


def _enough(best: float) -> float:
    """The least gain that is as good as the best."""
    return min(best, ENOUGH * best)


def _least_of(budget: Budget) -> Callable[[Candidate], tuple[float, float]]:
    """Of equals the one that takes the least in all: kinds have as many numbers."""
    return lambda candidate: (budget.amount(candidate), Budget().amount(candidate))


def _unusual(candidate: Candidate) -> tuple[int, bool, float]:
    """Kinds that fit worse are the least usual, then few layers, then ranks far from PEFT's, of which lower ones."""
    kind = FIT.index(candidate.kind) if candidate.kind in FIT else len(FIT)
    return kind, candidate.targets.few, candidate.r / RANK if candidate.r >= RANK else 1e6 / candidate.r


def _beside_lora(
    found: Candidate, best: float | None, others: Sequence[Candidate], amount: Callable[[Candidate], float]
) -> tuple[str, bool]:
    """A sentence about LoRA, and whether it is the better choice: it gained more, or as much while it takes less.

    `best`: gain of what is not LoRA; None: not measured. `others`: LoRA on the same layers, within the budget.
    """
    if not others:
        return "", False
    measured = _measured(others, len(found.gains))
    if best is None or not measured:
        return (
            f"{_beside(min(others, key=amount), found)}. Which is better was not measured: LoRA fits what is nearly of "
            "low rank better, and everything else worse"
        ), False
    first, gain = max(measured, key=lambda pair: pair[1])
    if _enough(gain) > best:
        return f"{first.method} is the better choice, as it gained more: {_beside(first, found)}", True
    if as_good := [c for c, own in measured if own >= _enough(best) and amount(c) < amount(found)]:
        lora = min(as_good, key=amount)
        return f"{lora.method} is the better choice, as it gained as much for less: {_beside(lora, found)}", True
    return _beside(first, found), False


def _beside(lora: Candidate, found: Candidate) -> str:
    told = (
        f"beside it {lora.method} has {lora.trainable_parameters / found.trainable_parameters:.2g} times the trained "
        f"numbers, {lora.memory_bytes / found.memory_bytes:.2g} times the memory and {lora.step / found.step:.2f} "
        "times the step"
    )
    if lora.gain is not None and found.gain is not None and _measured([lora], len(found.gains)):
        told += f", and {lora.gain:.0%} of the best gain, not {found.gain:.0%}"
    return told
