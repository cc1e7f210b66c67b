"""The host's time for one call of an adapted layer: what do Python, autograd and the ops cost around the kernels?

A layer so small that its arithmetic takes no time, on one token: a training step (forward, and gradients for the input
and the adapter), and a forward under no_grad in eval mode. With few tokens a GPU waits for the host, and this is what a
layer costs there. Timed are turns of calls, by the process's CPU time, on a GPU by the clock and without waiting for
it.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: python bench/host.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from bench import layer, measure, methods, questions, records
from bench.layer import BOTH, Layer, Spec
from bench.measure import Provider
from bench.methods import FROZEN
from bench.one_token import InScope
from bench.questions import Case, Setup

STEP, FORWARD = BOTH, "forward"
NAMES = {
    STEP: (
        FROZEN, "PEFT LoRA", "PEFT LoRA, 16-bit", "PEFT RandLoRA", "PEFT RandLoRA, accelerated", "randlora",
        "randlora very_sparse",
    ),
}  # fmt: skip
NAMES[FORWARD] = (*NAMES[STEP], "randlora cached", "randlora merged")
D, RANK = 64, 32


class HostTimer:
    """Mean seconds that the host is busy with a call. What the device does meanwhile is waited for between turns."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"
        # Other programs do not take part in the CPU time, but neither does what waits for the device.
        self.clock = time.perf_counter if self.cuda else time.process_time

    def turn(self, provider: Provider, calls: int) -> float:
        if calls > 1:
            provider.call()
        run, clock = provider.run, self.clock
        if self.cuda:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            run()
        found = clock() - start
        if self.cuda:
            torch.cuda.synchronize()
        return found / calls


def module(made: Layer, name: str) -> nn.Module:
    """The adapted layer alone, without the model that a library wraps around it."""
    return methods.inner(made.make(name)).layer


def step(made: Layer, name: str) -> Provider:
    adapted = module(made, name)
    wanted = [made.x, *(p for p in adapted.parameters() if p.requires_grad)]

    def run() -> list[torch.Tensor]:
        y = adapted(made.x)
        return [y, *torch.autograd.grad(y, wanted, made.grad)]

    return Provider(run, check=functools.partial(made.check, made.kind_of(name)))


def forward(made: Layer, name: str) -> Provider:
    state = name.removeprefix("randlora ")
    adapted = module(made, "randlora" if state in ("cached", "merged") else name).eval()
    call: Callable = adapted
    if state == "merged":
        adapted.base_layer = nn.Linear(made.spec.d, made.spec.d, dtype=made.dtype, device=made.x.device)
        adapted.base_layer.load_state_dict(made.net.layer.state_dict())
        adapted.merge()
    if state == "cached":
        call = InScope(adapted)
        with torch.no_grad():
            call(made.x.expand(8 * made.spec.d, -1))  # as a long prompt: it builds at once
        assert call.cache.nbytes > 0

    @torch.no_grad()
    def run() -> list[torch.Tensor]:
        return [call(made.x)]

    kind = made.kind_of("randlora" if call is not adapted or state == "merged" else name)
    return Provider(run, check=functools.partial(made.check, kind))


def case(spec: Spec, options: argparse.Namespace) -> Case:
    names = [name for name in NAMES[spec.which] if spec.dtype != "float32" or not name.endswith("16-bit")]

    def set_up() -> Setup:
        made, make = Layer(spec), step if spec.which == STEP else forward
        return Setup(
            {name: functools.partial(make, made, name) for name in names},
            baseline="PEFT LoRA",
            check=lambda result: None,  # every provider has its own
            dtype=made.dtype,
            clock=HostTimer(options.device),
        )

    return Case(spec.title("host"), spec.columns, set_up)


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("host", __doc__, argv)
    specs = [
        Spec(D, 1, RANK, dtype=dtype, which=which, device=options.device)
        for dtype in ("bfloat16", "float32")
        for which in (STEP, FORWARD)
    ]
    book = records.Book("host", layer.COLUMNS, options)
    questions.answer(book, [case(spec, options) for spec in specs], options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
