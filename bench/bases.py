"""Random bases: what does making them cost, in time and in memory?

4096 x 4096, r = 32: A [32, 1, 4096] and B [4096, 128, 32], 16.9 million elements.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

if not __package__:  # run as a file: python bench/bases.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from bench import measure, peak, questions, records
from bench.floors import Work
from bench.measure import Comparison, Provider
from bench.questions import Case, Columns, Setup

DIM, RANK = 4096, 32
CASES = (("dense", "float32"), ("dense", "bfloat16"), ("sparse", "int8"), ("very_sparse", "int8"))
BASELINE = "PEFT"
TERNARY_Z = {"sparse": 3, "very_sparse": math.sqrt(DIM)}

Pair = tuple[Tensor, ...]


def shapes(dim: int) -> tuple[tuple[int, ...], ...]:
    return (RANK, 1, dim), (dim, dim // RANK, RANK)  # A, B


# ---- providers: functions of the case that return the call to be timed ----


def randlora_fresh(kind: str, dtype: torch.dtype, device: str, dim: int) -> Callable[[], Pair]:
    """A new store, as a model's first layer makes it."""
    import randlora

    return lambda: randlora.RandomBases(dim, dim, RANK, kind).draw(dtype, torch.device(device))


def randlora_existing(kind: str, dtype: torch.dtype, device: str, dim: int) -> Callable[[], Pair]:
    import randlora

    bases = randlora.RandomBases(dim, dim, RANK, kind)
    out = tuple(torch.zeros(shape, dtype=dtype, device=device) for shape in shapes(dim))
    return lambda: tuple(bases.fill(t, stream, (0, 0, 0)) for stream, t in enumerate(out))


def randlora_packed(kind: str, dtype: torch.dtype, device: str, dim: int) -> Callable[[], Pair]:
    """The form that ternary bases are kept in: two bits an element, or lists of positions."""
    import randlora

    return lambda: randlora.RandomBases(dim, dim, RANK, kind).pattern(dim, torch.device(device))[0]


def peft(kind: str, dtype: torch.dtype, device: str, dim: int) -> Callable[[], Pair]:
    """PEFT's own code. It draws dense bases in bf16 and casts them to fp32 by default; ternary ones are fp32."""
    from peft import RandLoraConfig
    from peft.tuners.randlora.model import RandLoraModel

    config = RandLoraConfig(r=RANK)
    model = SimpleNamespace(_find_dim=lambda config: (dim, dim))

    def call() -> Pair:
        if kind == "dense":
            RandLoraModel._init_randlora_A_randlora_B(model, config, "default")
        else:
            RandLoraModel._init_randlora_A_randlora_B_sparse(model, config, "default", sparsity=TERNARY_Z[kind])
        A, B = model.__dict__.pop("randlora_A"), model.__dict__.pop("randlora_B")
        stored = dtype if dtype.is_floating_point else torch.float32
        return A["default"].to(device, stored), B["default"].to(device, stored)

    return call


def torch_random(kind: str, dtype: torch.dtype, device: str, dim: int) -> Callable[[], Pair]:
    """PyTorch's cheapest call. For int8 it makes -1, 0 and +1 equally likely, which is not what `sparse` means."""
    edge = math.sqrt(3)

    def draw(t: Tensor) -> Tensor:
        return t.uniform_(-edge, edge) if dtype.is_floating_point else t.random_(-1, 2)

    return lambda: tuple(draw(torch.empty(shape, dtype=dtype, device=device)) for shape in shapes(dim))


def zeros(kind: str, dtype: torch.dtype, device: str, dim: int) -> Callable[[], Pair]:
    return lambda: tuple(torch.empty(shape, dtype=dtype, device=device).zero_() for shape in shapes(dim))


PROVIDERS = {
    "randlora": randlora_fresh,
    "randlora, existing memory": randlora_existing,
    "randlora, as it is kept": randlora_packed,
    BASELINE: peft,
    "PyTorch uniform_ / random_": torch_random,
    "floor: empty().zero_()": zeros,
}


def check(kind: str, bases: Pair) -> None:
    """Shapes, mean and variance."""
    for t, shape in zip(bases, shapes(DIM), strict=True):
        assert tuple(t.shape) == shape, f"shape {tuple(t.shape)}, expected {shape}"
        values, expected = t.double(), 1.0
        if kind != "dense":  # with or without the unit-variance factor
            values, expected = values / values.abs().max(), 1 / TERNARY_Z[kind]
        mean, variance = values.mean().item(), values.square().mean().item()
        error = 1 / math.sqrt(t.numel())  # of the mean, for unit variance
        # PEFT and uniform_ round to bf16 before the sign is symmetric: their means are off by half a percent.
        assert abs(mean) < 6 * error + (0.01 if kind == "dense" else 0), f"mean {mean:.2e}, not 0"
        # PEFT rounds to bf16 before and after it divides: up to 1%. Of few non-zeros the variance says less.
        allowed = 0.01 + 6 * error * max(2, math.sqrt(TERNARY_Z.get(kind, 0)))
        assert abs(variance / expected - 1) < allowed, f"variance {variance:.4f}, not {expected:.4f}"


def case(kind: str, dtype: str, options: argparse.Namespace) -> Case:
    arguments = kind, getattr(torch, dtype), options.device, DIM

    def provider(name: str) -> Provider:
        build = PROVIDERS[name]
        exact = build not in (zeros, randlora_packed) and (build is not torch_random or kind == "dense")
        return Provider(build(*arguments), checked=exact)

    def extra(result: Comparison) -> tuple[Columns, bool]:
        """Bytes of each provider's result, and what making it took beyond them."""
        done = [name for name, timing in result.timings.items() if timing.samples]
        found = {name: {"result_bytes": sum(t.nbytes for t in PROVIDERS[name](*arguments)())} for name in done}
        stopped = result.interrupted
        if not stopped and not options.quick:
            fresh = [name for name in done if PROVIDERS[name] is not randlora_existing]
            small = *arguments[:-1], 8 * RANK
            column = "peak_above_result_bytes"
            stopped = questions.add_peaks(
                found, fresh, lambda name: peak.above_result(PROVIDERS[name], arguments, small, options.device), column
            )
            for name in fresh:
                if column in found[name]:
                    size, above = found[name]["result_bytes"], found[name][column]
                    print(f"  {name}: result {size:,} bytes, at its peak {above:+,} more")
        return found, stopped

    def set_up() -> Setup:
        written = Work(0, sum(math.prod(shape) for shape in shapes(DIM)) * arguments[1].itemsize)
        names = [name for name in PROVIDERS if kind != "dense" or PROVIDERS[name] is not randlora_packed]
        return Setup(
            {name: functools.partial(provider, name) for name in names},
            baseline=BASELINE,
            check=functools.partial(check, kind),
            dtype=arguments[1] if arguments[1].is_floating_point else torch.float32,
            work={name: written for name in names if PROVIDERS[name] is not randlora_packed},
            extra=extra,
        )

    columns = {"kind": kind, "dtype": dtype, "dim": DIM, "r": RANK}
    return Case(f"bases {kind} {dtype} {DIM} x {DIM} r={RANK}", columns, set_up)


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("bases", __doc__, argv)
    book = records.Book("bases", ("kind", "dtype", "dim", "r"), options)
    questions.answer(
        book, [case(*one, options) for one in CASES if not options.quick or one != ("dense", "bfloat16")], options
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
