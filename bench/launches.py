"""What does a layer ask of the device: how many launches, how much time of it, and does the host ever wait?

Forward and backward of a d -> d layer, traced by torch.profiler after a warm-up, for every kind and strategy. "graph"
is the same step replayed as a CUDA graph: what is left of the step's time where the host is out of the way. On a CPU
the operators of PyTorch and randlora are counted, which tells nothing about a GPU but that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python bench/launches.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every profile writes two lines

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from bench import measure, records
from bench.layer import Layer, Spec

# (kind, strategy, dtype) -> launches forward and backward of a square layer without a bias, counted from csrc (NOTES).
CASES: dict[tuple[str, str, str], tuple[int, int]] = {
    ("dense", "factored", "bfloat16"): (4, 9),
    ("dense", "materialized", "bfloat16"): (4, 10),
    ("dense", "merged", "float32"): (4, 9),
    ("sparse", "factored", "bfloat16"): (6, 11),
    ("sparse", "materialized", "bfloat16"): (6, 14),
    ("sign", "factored", "bfloat16"): (6, 11),
    ("very_sparse", "factored", "bfloat16"): (6, 11),
    ("hadamard", "factored", "bfloat16"): (4, 8),  # with as many tokens as one chunk has
}
WAITING = ("Synchronize", "cudaMemcpy2D", "cudaFree", "cudaMalloc")  # runtime calls in which the host waits
ROUNDS = 20


def expected_launches(spec: Spec, strategy: str) -> tuple[int, int]:
    """Of forward and backward, counted from the code."""
    forward, backward = CASES[spec.kind, strategy, spec.dtype]
    if (spec.kind, strategy) != ("hadamard", "factored"):
        return forward, backward
    # All but the product with the weight once for each chunk of tokens (csrc/cuda/hadamard.cuh), of two intermediates.
    columns, item = -(-spec.d // spec.r), getattr(torch, spec.dtype).itemsize
    chunk = (32 << 20) // (2 * spec.r * (columns + -columns % (16 // item)) * item)
    chunks = -(-spec.T // chunk)
    return 1 + chunks * (forward - 1), 1 + chunks * (backward - 1)


@dataclass
class Trace:
    """Of one pass. `kernels`: name and microseconds of what ran on the device, in order."""

    launches: int
    waits: list[str]
    kernels: list[tuple[str, float]]

    @property
    def device_us(self) -> float:
        return sum(us for _, us in self.kernels)


def trace(call: Callable[[], Any], on_gpu: bool) -> tuple[Trace, Any]:
    """One call, and what it returned."""
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])], acc_events=True
    ) as found:
        with record_function("the pass"):  # ending the profile waits
            result = call()
        if on_gpu:
            torch.cuda.synchronize()
    events = found.events()
    (span,) = (e.time_range for e in events if e.name == "the pass" and e.device_type == DeviceType.CPU)
    inside = [
        e for e in events
        if e.device_type == DeviceType.CPU and span.start <= e.time_range.start and e.time_range.end <= span.end
    ]  # fmt: skip
    if not on_gpu:
        leaves = [e for e in inside if not e.cpu_children and e.name.startswith(("aten::", "randlora::"))]
        return Trace(len(leaves), [], [(e.name, e.time_range.elapsed_us()) for e in leaves]), result
    names = [e.name for e in inside]
    launches = sum("LaunchKernel" in name or name in ("cudaMemcpyAsync", "cudaMemsetAsync") for name in names)
    waits = [name for name in names if name == "cudaMemcpy" or any(part in name for part in WAITING)]
    kernels = [
        (e.name, e.time_range.elapsed_us()) for e in events if e.device_type == DeviceType.CUDA and e.name != "the pass"
    ]
    return Trace(launches, waits, kernels), result


def median_ms(call: Callable[[], Any], device: str) -> float:
    clock = measure.timer(device)
    return 1e3 * statistics.median(clock.turn(measure.Provider(call), 1) for _ in range(ROUNDS))


def graph_of(step: Callable[[], Any]) -> Callable[[], None]:
    """A replay of `step` recorded as a CUDA graph.

    No result of an earlier pass may be alive: its parameters' nodes would make the recorded pass wait for the stream
    that they were made on, which ends the capture.
    """
    gc.collect()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def host_ms(step: Callable[[], Any], device: str) -> float:
    """How long the host is busy with one step, however long the device takes."""
    samples = []
    for _ in range(ROUNDS):
        if device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        samples.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(samples)


def steps_of(spec: Spec, strategy: str) -> tuple[Layer, nn.Module, list[Tensor], Callable[[], list[Tensor]]]:
    """A layer as it is made, adapted, what is differentiated by, and one step of it."""
    made = Layer(spec)
    adapted = made.make(f"randlora {strategy}")
    wanted = [made.x, *(p for p in adapted.parameters() if p.requires_grad)]

    def step() -> list[Tensor]:
        y = adapted(made.x)
        return [y.detach(), *torch.autograd.grad(y, wanted, made.grad)]

    return made, adapted, wanted, step


def measured(spec: Spec, strategy: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The row of a case, and one per kernel of it."""
    on_gpu = torch.device(spec.device).type == "cuda"
    made, adapted, wanted, step = steps_of(spec, strategy)
    for _ in range(3):  # bases, workspaces and memory come with the first ones
        step()
    trace(lambda: None, on_gpu)  # so does the profiler's
    forward, y = trace(lambda: adapted(made.x), on_gpu)
    backward, _ = trace(lambda: torch.autograd.grad(y, wanted, made.grad), on_gpu)
    about = {"kind": spec.kind, "strategy": strategy, "dtype": spec.dtype, "d": spec.d, "T": spec.T}
    expected = expected_launches(spec, strategy)
    row = about | {
        "launches": f"{forward.launches} + {backward.launches}",
        "from_the_code": f"{expected[0]} + {expected[1]}",
        "device_ms": f"{(forward.device_us + backward.device_us) / 1e3:.4f}",
        "host_ms": f"{host_ms(step, spec.device):.4f}",
        "step_ms": f"{median_ms(step, spec.device):.4f}",
        "graph_ms": "",
        "waits": " ".join(sorted({*forward.waits, *backward.waits})),
    }
    kernels = [
        about | {"pass": name, "kernel": kernel, "us": f"{us:.2f}"}
        for name, one in (("forward", forward), ("backward", backward))
        for kernel, us in one.kernels
    ]
    return row, kernels


def main(argv: list[str] | None = None) -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--sizes", default="4096x8192,3072x840", metavar="DxT,...", help="default: %(default)s")

    options = measure.parse("launches", __doc__, argv, add=add)
    rows, kernels, cases, failed = [], [], [], False
    for size in options.sizes.split(","):
        d, tokens = map(int, size.split("x"))
        for kind, strategy, dtype in CASES:
            cases.append((Spec(d, tokens, kind=kind, dtype=dtype, device=options.device), strategy))
            try:
                row, found = measured(*cases[-1])
            except Exception as problem:  # the others are worth having
                row, found = {"kind": kind, "strategy": strategy, "dtype": dtype, "d": d, "T": tokens}, []
                row["failed"] = measure.reason(problem)
            failed = failed or bool(row.get("failed") or row.get("waits"))
            rows.append(row)
            kernels += found
            print("  ".join(str(value) for value in row.values()), flush=True)
            records.put_beside(options, "launches", rows)
            records.put_beside(options, "launches-kernels", kernels)
    if torch.device(options.device).type == "cuda":
        for row, (spec, strategy) in zip(rows, cases, strict=True):  # last, as a failed capture spoils what follows
            try:
                row["graph_ms"] = f"{median_ms(graph_of(steps_of(spec, strategy)[-1]), spec.device):.4f}"
            except Exception as problem:
                row["failed"], failed = f"graph: {measure.reason(problem)}", True
                break
            finally:
                records.put_beside(options, "launches", rows)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
