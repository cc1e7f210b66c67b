"""Where lambda and gamma start, and the scale that goes with it: PEFT's start, and the rule ``randlora_alpha="auto"``.

The rule is about one step. Lambda starts at 0 and gamma at g, so that the first step of Adam sets every number of
lambda to plus or minus the learning rate. The numbers whose terms point against the gradient of y add up: for a single
token x the output moves along that gradient by

    rms(dy) / rms(x) = 2/pi * lr * gain        gain = s * g * R * sqrt(in / out)

with s = alpha / r and R = num_bases * r, the number of rank-one terms. (2/pi is the square of the mean absolute value
of a normal number: each term has one such factor from A and one from B.) An equal gain in all layers makes a learning
rate mean the same for every rank, width, number of bases and kind.

An adapter has one alpha, and so one s; the g of a layer makes up for its shape. So s is chosen such that g is GAMMA in
the middle: its geometric mean over the layers. How large g itself is decides when growth turns from linear in time to
quadratic, as gamma then grows, too.
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
GAMMA = 0.05
GAMMA_LR_RATIO = 1.0  # of gamma's learning rate to lambda's

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
        r, num_bases = require_size("r", settings.get("r", 32)), settings.get("num_bases")
        layers = [Shape(*pair, num_bases or bases_for_full_rank(min(pair), r)) for pair in sizes]
        settings["randlora_alpha"] = ByRule(alpha_of(r, layers))
    return settings


def _reach(r: int, layer: Shape) -> float:
    return layer.num_bases * r * math.sqrt(layer.in_features / layer.out_features)
