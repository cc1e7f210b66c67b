"""Floors: the least time that a case can take on this machine, by its multiply-adds and by the bytes it has to move.

What the machine can do is measured in the same run, just before the case: a large copy, and a large product in the
case's dtype. The floor is the longer of the two times; `reached` of a provider is the floor over its median. More than
1 is no mistake where memory stays in a cache, or where a provider computes in another dtype than the case's.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench import measure
from bench.measure import Comparison, Provider

COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
PRODUCT_SIZES = {"cpu": (512, 2048), "cuda": (8192,)}  # the larger one unless the smaller one takes long already
REPEATS = 4


@dataclass(frozen=True)
class Work:
    """What a call cannot do without: multiply-adds of products, and bytes to be read and written once."""

    multiply_adds: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.multiply_adds + other.multiply_adds, self.bytes + other.bytes)


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a copy, read and written ones; multiply-adds per second of a product."""

    copy: float
    product: float

    def seconds(self, work: Work) -> float:
        return max(work.multiply_adds / self.product, work.bytes / self.copy)

    def columns(self, work: Work, median: float) -> dict[str, Any]:
        """Of a CSV row. `median`: seconds, NaN where nothing was measured."""
        floor = self.seconds(work)
        return {
            "floor_multiply_adds": work.multiply_adds,
            "floor_bytes": work.bytes,
            "floor_ms": f"{1e3 * floor:.4g}",
            "reached": f"{floor / median:.3g}" if median > 0 else "",
            "copy_GB_per_s": f"{self.copy / 1e9:.3g}",
            "product_G_per_s": f"{self.product / 1e9:.4g}",
        }


_best: dict[tuple[str, torch.dtype], Ceilings] = {}  # of this process


def ceilings(dtype: torch.dtype, device: str) -> Ceilings:
    """The best seen in this run, of which this call is a part."""
    kind = torch.device(device).type
    timer = measure.timer(device)

    def fastest(provider: Provider) -> float:
        seconds = timer.turn(provider, 1)
        return min([seconds, *(timer.turn(provider, 1) for _ in range(REPEATS if seconds < 0.2 else 0))])

    source = torch.zeros(COPY_BYTES[kind], dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    copy = 2 * COPY_BYTES[kind] / fastest(Provider(functools.partial(target.copy_, source)))
    del source, target
    product = 0.0
    for size in PRODUCT_SIZES[kind]:
        a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
        # Forward, dx and dW of a layer: in 16 bits a CPU may know one of them ten times better than another.
        forms = (a, b.T), (a, b), (a.T, b)
        seconds = min(fastest(Provider(functools.partial(torch.mm, *form))) for form in forms)
        product = max(product, size**3 / seconds)
        if seconds > 0.02:
            break
    before = _best.get((kind, dtype), Ceilings(0, 0))
    _best[kind, dtype] = Ceilings(max(copy, before.copy), max(product, before.product))
    return _best[kind, dtype]


def columns(work: Mapping[str, Work], ceilings: Ceilings, result: Comparison) -> dict[str, dict[str, Any]]:
    """Provider -> columns, of those that have been timed."""
    return {
        name: ceilings.columns(work[name], timing.median)
        for name, timing in result.timings.items()
        if name in work and timing.samples
    }


# ---- one layer ----


def frozen_layer(which: str, T: int, in_features: int, out_features: int, element_bytes: int) -> Work:
    """y = x W^T, and dx = g W: either way all three matrices are moved once."""
    both = 2 if which == "forward + backward" else 1
    moved = (T * in_features + T * out_features + in_features * out_features) * element_bytes
    return Work(both * T * in_features * out_features, both * moved)


def beside(which: str, forward: Work, backward: Work) -> Work:
    return {"forward": forward, "backward": backward}.get(which, forward + backward)


def full_layer(which: str, T: int, in_features: int, out_features: int, element_bytes: int) -> Work:
    """With dW = g^T x, which reads x once more and writes a gradient of the weight's size."""
    weight = in_features * out_features
    gradient = Work(T * weight, (T * in_features + weight) * element_bytes)
    return frozen_layer(which, T, in_features, out_features, element_bytes) + beside(which, Work(), gradient)


def low_rank(which: str, T: int, in_features: int, out_features: int, rank: int, element_bytes: int, kind: str) -> Work:
    """What LoRA, DoRA and VeRA add to the frozen layer.

    Backward has two products per factor that is trained and one per factor that is not (VeRA's, whose scales come
    with them); DoRA's norm needs B A as a matrix, forward.
    """
    thin = T * rank * (in_features + out_features)
    moved = rank * (in_features + out_features) * element_bytes
    norm = rank * in_features * out_features if kind == "DoRA" else 0
    trained = 1 if kind == "VeRA" else 2
    return beside(which, Work(thin + norm, moved), Work(trained * thin, trained * moved))
