"""One token through a layer, as in decoding: what does an adapter cost that is unmerged, cached or merged?

A d -> d layer under ``no_grad`` in eval mode, one token at a time; ``python -m bench generate --layers``.
"""

from __future__ import annotations

import argparse
import contextvars
import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import floors, questions, records
from bench.measure import Provider

RANK = 32
BASELINE = "frozen layer"
CASES = ((1024, "float32"), (2048, "float32"), (4096, "float32"), (2048, "bfloat16"))


class Case:
    def __init__(self, d: int, dtype: torch.dtype, device: str) -> None:
        import randlora

        torch.manual_seed(0)
        self.x = torch.randn(1, 1, d, dtype=dtype, device=device)
        self.base = nn.Linear(d, d, dtype=dtype, device=device).requires_grad_(False)
        self.layer = randlora.Linear(copy.deepcopy(self.base), r=RANK).eval()
        with torch.no_grad():
            self.layer.randlora_lambda["default"].normal_(0, 0.02)

    def provider(self, module: Callable[[Tensor], Tensor]) -> Provider:
        @torch.no_grad()
        def run() -> Tensor:
            return module(self.x)

        return Provider(run)

    def check(self, y: Tensor) -> float:
        expected = nn.functional.linear(
            self.x.double(), self.base.weight.double() + self.layer.get_delta_weight("default").double(),
            self.base.bias.double(),
        )  # fmt: skip
        error = ((y - expected).norm() / expected.norm()).item()
        assert error < (1e-4 if self.x.dtype == torch.float32 else 0.05), f"relative error {error}"
        return error


def frozen(case: Case) -> Provider:
    return Provider(case.provider(case.base).run, checked=False)


class InScope:
    """`function`, in a context of its own with an inference cache that stays open: a server that decodes on and on."""

    def __init__(self, function: Callable, limit: int = 1 << 30) -> None:
        import randlora

        self.function, self.context = function, contextvars.copy_context()
        self.scope = randlora.inference_cache(limit)  # closes when it is freed
        self.cache = self.context.run(self.scope.__enter__)

    def __call__(self, *arguments):
        return self.context.run(self.function, *arguments)


def cached(case: Case) -> Provider:
    scoped = InScope(case.layer)
    with torch.no_grad():
        scoped(case.x.expand(1, case.x.shape[-1], -1))  # as a long prompt: it builds at once
    assert scoped.cache.nbytes > 0
    return case.provider(scoped)


def uncached(case: Case) -> Provider:
    return case.provider(case.layer)


def merged(case: Case) -> Provider:
    layer = copy.deepcopy(case.layer)
    layer.merge()
    return case.provider(layer)


def providers() -> dict[str, Callable[[Case], Provider]]:
    return {BASELINE: frozen, "randlora cached": cached, "randlora merged": merged, "randlora, no cache": uncached}


def case(d: int, dtype: str, options: argparse.Namespace) -> questions.Case:
    def set_up() -> questions.Setup:
        made = Case(d, getattr(torch, dtype), options.device)
        return questions.Setup(
            {name: functools.partial(make, made) for name, make in providers().items()},
            baseline=BASELINE,
            check=made.check,
            dtype=made.x.dtype,
            work=floors.frozen_layer("forward", 1, d, d, made.x.dtype.itemsize),
        )

    return questions.Case(f"one token, {dtype}, d={d} r={RANK}", {"dtype": dtype, "d": d, "r": RANK}, set_up)


def layers(options: argparse.Namespace) -> None:
    book = records.Book("generate-layer", ("dtype", "d", "r"), options)
    questions.answer(book, [case(d, dtype, options) for d, dtype in CASES], options)
