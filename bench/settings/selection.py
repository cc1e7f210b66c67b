"""Which curves are measured, the most valuable first, and at which learning rates.

Rates are ``1e-4 * 2**k``. Each curve begins with three that are a factor of 4 apart; then those beside its best one are
tried until both neighbours of the best, a factor of 2 away, are known to be worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from bench.settings.points import Column
from randlora.layers.initial import GAIN, GAMMA

RATE, COARSE, MOST = 1e-4, (2, 4, 6), 9
EXPONENTS = range(-8, 16)


def rate(k: int) -> float:
    return float(f"{RATE * 2.0**k:.6g}")


def exponent(lr: float) -> int:
    return round(math.log2(lr / RATE))


def wanted(found: Mapping[int, float]) -> list[int]:
    """Exponents k that are to be tried next, given the known losses; none once the best lies between worse ones."""
    if missing := [k for k in COARSE if k not in found]:
        return missing
    if len(found) >= MOST:
        return []
    finite = [k for k in found if math.isfinite(found[k])]
    if not finite:  # all diverged
        return [k for k in (min(found) - 2,) if k in EXPONENTS]
    best = min(finite, key=found.__getitem__)
    return [k for k in (best - 1, best + 1) if k not in found and k in EXPONENTS]


def rule(width: int, r: int, kind: str = "dense", *, task: str = "language", **more: float) -> Column:
    return Column(task, width, "rule", kind, r, **{"gain": GAIN, "gamma": GAMMA, **more})


def peft(width: int, r: int, kind: str = "dense", *, task: str = "language", **more: float) -> Column:
    return Column(task, width, "PEFT", kind, r, **more)


def lora(width: int, *, task: str = "language") -> Column:
    return Column(task, width, "LoRA", "lora", 8)


def gpu() -> Iterator[Column]:
    # Ranks and widths: where a rule can fail most, the corners, come first.
    for width, r in ((512, 32), (128, 4), (1024, 4), (128, 128), (1024, 128)):
        yield rule(width, r)
        yield peft(width, r)
    yield from (lora(512), lora(128), lora(1024))
    yield from (rule(0, r, task="tweets") for r in (4, 32, 128))
    yield from (peft(0, 32, task="tweets"), lora(0, task="tweets"))
    yield from (rule(512, 32, kind) for kind in ("hadamard", "sparse", "very_sparse"))
    yield from (rule(512, 8, num_bases=4), rule(512, 32, num_bases=1), rule(512, 4), rule(512, 128))
    # How large gamma starts; a learning rate of its own for gamma would be the same thing (tests/layers/test_rates.py).
    yield from (rule(512, 32, gamma=gamma) for gamma in (0.05, 0.0025, 0.2, 1.0))
    yield from (rule(0, 32, gamma=gamma, task="tweets") for gamma in (0.05, 0.0025, 0.2))
    yield from (rule(1024, 32), peft(1024, 32), rule(128, 32), peft(128, 32))
    yield from (rule(width, 4, kind) for kind in ("hadamard", "very_sparse") for width in (128, 1024))
    yield from tweets()


def tweets() -> Iterator[Column]:
    """The same question of a pretrained encoder."""
    yield from (rule(0, r, task="tweets") for r in (4, 32, 128))
    yield from (peft(0, r, task="tweets") for r in (4, 128))
    yield lora(0, task="tweets")
    yield from (rule(0, 32, kind, task="tweets") for kind in ("hadamard", "sparse", "very_sparse"))
    yield rule(0, 32, num_bases=4, task="tweets")


def kinds() -> Iterator[Column]:
    """Kinds and numbers of bases at widths that two cores can pretrain, what differs most first."""
    for width in (128, 512, 256):
        yield from (rule(width, 32), rule(width, 32, num_bases=1), rule(width, 8, num_bases=4))
        yield rule(width, 32, "hadamard", num_bases=1)
        yield from (rule(width, r, kind) for kind in ("hadamard", "very_sparse") for r in (4, 128))
        yield rule(width, 32, "sparse")


def everything() -> Iterator[Column]:
    yield from gpu()
    yield from tweets()
    for width in (128, 256, 512, 1024):
        for kind in ("dense", "hadamard", "sparse", "very_sparse"):
            for r in (4, 32, 128):
                yield rule(width, r, kind)
                yield rule(width, r, kind, num_bases=4)
        for r in (4, 32, 128):
            yield peft(width, r)
            yield from (rule(width, r, gamma=gamma) for gamma in (0.02, 0.2, 1.0))
        yield lora(width)


def quick() -> Iterator[Column]:
    yield from (start(128, r) for r in (4, 32) for start in (rule, peft))


SELECTIONS = {"gpu": gpu, "tweets": tweets, "kinds": kinds, "all": everything, "quick": quick}


def columns(name: str, only: str | None = None) -> list[Column]:
    """Those of a selection whose names have every word of `only`, each once."""
    words = (only or "").split()
    found = dict.fromkeys(SELECTIONS[name]())
    return [column for column in found if all(word in str(column).split() for word in words)]
