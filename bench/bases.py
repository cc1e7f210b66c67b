"""Random bases: what does making them cost, in time and in memory?

4096 x 4096, r = 32: A [32, 1, 4096] and B [4096, 128, 32], 16.9 million elements.
"""

from __future__ import annotations

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

from bench import measure, plots, records
from bench.measure import Provider

DIM, RANK = 4096, 32
CASES = (("dense", "float32"), ("dense", "bfloat16"), ("sparse", "int8"))
BASELINE = "PEFT"
TERNARY_Z = 3

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
            RandLoraModel._init_randlora_A_randlora_B_sparse(model, config, "default", sparsity=TERNARY_Z)
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
    BASELINE: peft,
    "PyTorch uniform_ / random_": torch_random,
    "floor: empty().zero_()": zeros,
}


def check(kind: str, bases: Pair) -> None:
    """Shapes, mean and variance."""
    for t, shape in zip(bases, shapes(DIM), strict=True):
        assert tuple(t.shape) == shape, f"shape {tuple(t.shape)}, expected {shape}"
        values, expected = t.double(), 1.0
        if kind == "sparse":  # with or without the unit-variance factor
            values, expected = values / values.abs().max(), 1 / TERNARY_Z
        mean, variance = values.mean().item(), values.square().mean().item()
        error = 1 / math.sqrt(t.numel())  # of the mean, for unit variance
        # PEFT and uniform_ round to bf16 before the sign is symmetric: their means are off by half a percent.
        assert abs(mean) < 6 * error + (0.01 if kind == "dense" else 0), f"mean {mean:.2e}, not 0"
        # PEFT rounds to bf16 before and after it divides: up to 1%.
        assert abs(variance / expected - 1) < 0.01 + 12 * error, f"variance {variance:.4f}, not {expected:.4f}"


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("bases", __doc__, argv)
    book = records.Book("bases", ("kind", "dtype", "dim", "r"), options)
    for kind, dtype in CASES:
        title = f"bases {kind} {dtype}"
        if options.only and options.only not in title:
            continue
        print(f"{title}, {DIM} x {DIM}, r = {RANK}")
        arguments = (kind, getattr(torch, dtype), options.device)

        def provider(build: Callable[..., Callable[[], Pair]], arguments: tuple = arguments) -> Provider:
            exact = build is not zeros and (build is not torch_random or arguments[0] == "dense")
            return Provider(build(*arguments, DIM), checked=exact)

        result = measure.compare(
            title,
            {name: functools.partial(provider, build) for name, build in PROVIDERS.items()},
            baseline=BASELINE,
            check=functools.partial(check, kind),
            options=options,
        )
        print(measure.table(result))
        extra = {} if result.interrupted else memory(result, arguments)
        book.add({"kind": kind, "dtype": dtype, "dim": DIM, "r": RANK}, result, extra)
        if result.interrupted:
            break
    plots.draw(book.path)
    return 0


def memory(result: measure.Comparison, arguments: tuple) -> dict[str, dict[str, int]]:
    """Bytes of each provider's result, and what making it took beyond them (on the CPU)."""
    columns: dict[str, dict[str, int]] = {}
    for name, build in PROVIDERS.items():
        if not result.timings[name].samples:
            continue
        columns[name] = {"result_bytes": sum(t.nbytes for t in build(*arguments, DIM)())}
        if arguments[-1] == "cpu":
            peak = measure.peak_above_result(build, (*arguments, DIM), (*arguments, 8 * RANK))
            columns[name]["peak_above_result_bytes"] = peak
            print(f"  {name}: result {columns[name]['result_bytes']:,} bytes, at its peak {peak:+,} more")
    return columns


if __name__ == "__main__":
    raise SystemExit(main())
