"""Where lambda and gamma start, and the scale that goes with it: PEFT's start, and the rule ``randlora_alpha="auto"``.

The rule is about one step. Lambda starts at 0 and gamma at gamma_0, so that the first step of Adam sets each number of
lambda to plus or minus the learning rate, and each of the P = num_bases * r rank-one terms moves the output against the
gradient that it sees. For a single token x the moves along that gradient add up to

    rms(dy) / rms(x) = 2/pi * lr * gain        gain = s * gamma_0 * P * sqrt(in / out)        s = alpha / r

(2/pi is the square of a normal number's mean size: a term has one such factor from A and one from B.) An equal gain in
all layers makes a learning rate mean the same for every rank, width, number of bases and kind.

Across that gradient the terms move the output at random, which is nothing in the first order: by lr * gain * sqrt(out /
P), and where in > out, as then all bases share A's r rows on that side, by lr * gain * sqrt(2/pi * out / r).

An adapter has one alpha, and so one s. The gamma_0 of a layer makes up for its shape, and s is such that the geometric
mean of all gamma_0 is GAMMA. How large that is decides when growth turns from linear in time to quadratic: once gamma
has moved by about gamma_0, after gamma_0 / lr steps.

Adam does not see the scale of a gradient, so that GAIN * c and GAMMA / c with a learning rate of lr / c go the same
way: beside the unit of the learning rate only the product GAIN * GAMMA counts, and a rate of its own for gamma would be
the same as another product (tests/layers/test_rates.py). docs/quality.md has what was measured: products from 0.05 to
0.2 are alike, larger ones are worse. GAIN then says which learning rate is best. LEARNING_RATE is near the best for
MiniLM on tweets; for small language models in short runs two to four times as much was better.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ..bases.definition import bases_for_full_rank
from ..checks import require_float, require_size

GAIN = 20.0
GAMMA = 0.01  # the geometric mean of the layers' gamma_0
LEARNING_RATE = 1e-3  # of Adam and its like

Auto = Literal["auto"]
AUTO: Auto = "auto"


class Shape(NamedTuple):
    """What the rule has to know of a layer."""

    in_features: int
    out_features: int
    num_bases: int


@dataclass(frozen=True)
class ByRule:
    """An alpha that the rule has found for all layers of an adapter. Each of them starts its gamma by the rule."""

    alpha: float


Alpha = float | Auto | ByRule


def require_alpha(alpha: float | Auto) -> float | Auto:
    """`alpha` as a finite float, or ``"auto"``, or TypeError / ValueError."""
    if isinstance(alpha, str) and alpha == AUTO:
        return AUTO
    if isinstance(alpha, bool) or not isinstance(alpha, numbers.Real):
        raise TypeError(f"randlora_alpha must be a number or {AUTO!r}, got {alpha!r} ({type(alpha).__name__})")
    return require_float("randlora_alpha", alpha)


def alpha_of(r: int, layers: Iterable[Shape]) -> float:
    """The rule's alpha for an adapter of these layers, all of rank `r`.

    It has six digits: every machine, whatever its logarithm's last bit, finds the same number, and files are readable.
    """
    logs = [math.log(_reach(r, layer)) for layer in layers]
    alpha = r * GAIN / (GAMMA * math.exp(math.fsum(logs) / len(logs)))
    return float(f"{alpha:.6g}")


def start(alpha: Alpha, r: int, layer: Shape) -> tuple[float, float]:
    """Alpha as a number, and what gamma starts with: with a given number PEFT's ``1 / max(num_bases, min_dim)``."""
    if not isinstance(alpha, ByRule):
        number = require_alpha(alpha)
        if not isinstance(number, str):
            return number, 1 / max(layer.num_bases, min(layer[:2]))
        alpha = ByRule(alpha_of(r, [layer]))
    return alpha.alpha, GAIN / (alpha.alpha / r * _reach(r, layer))


def for_layers(settings: Mapping[str, Any], sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Keyword arguments of :class:`randlora.Linear` for several layers, with one alpha where they say ``"auto"``.

    `sizes`: in_features and out_features of each.
    """
    settings = dict(settings)
    if settings.get("randlora_alpha") == AUTO:
        r, n = require_size("r", settings.get("r", 32)), settings.get("num_bases")
        n = n if n is None else require_size("num_bases", n)
        layers = [Shape(*pair, n or bases_for_full_rank(min(pair), r)) for pair in sizes]
        settings["randlora_alpha"] = ByRule(alpha_of(r, layers))
    return settings


def _reach(r: int, layer: Shape) -> float:
    return layer.num_bases * r * math.sqrt(layer.in_features / layer.out_features)
