"""Each CUDA kernel of ours at the sizes of the targets: time, and the share of the memory bandwidth.

`--ncu` runs every case once, between the profiler's marks, for `ncu --profile-from-start off`.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: python bench/kernels.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import measure, records

BANDWIDTH = 3.35e12  # of an H100's memory, bytes per second
ROUNDS = 20

Case = tuple[str, float, Callable[[], object]]  # title, bytes that must move, call


def cases(device: torch.device, d: int, tokens: int, r: int = 32) -> list[Case]:
    """`d` features, `tokens` rows of the input; bytes count what the call reads and writes at least once."""
    import randlora
    from randlora.bases import patterns

    ops, n, bf16 = torch.ops.randlora, d // r, torch.bfloat16
    found: list[Case] = []

    for dtype, sparsity in ((torch.float32, None), (bf16, None), (torch.int8, 3.0)):
        out = torch.empty(d, n, r, dtype=dtype, device=device)
        name = str(dtype).removeprefix("torch.")
        found.append((f"base {name}", out.nbytes, lambda out=out, z=sparsity: ops.fill_bases_(out, 1, 1, (0, 0, 0), z)))

    lam, gamma = torch.randn(r, n, device=device), torch.randn(n, d, device=device)
    for dtype in (torch.float32, bf16):
        A, name = torch.randn(r, 1, d, dtype=dtype, device=device), str(dtype).removeprefix("torch.")
        size = r * n * d * dtype.itemsize
        found.append((f"scaled base {name}", size, lambda A=A, dtype=dtype: ops.unique_base(A, lam, gamma, 1.0, dtype)))
        G = torch.randn(r, n, d, device=device)  # fp32, as a layer's backward has it
        found.append((f"its gradient, A {name}", G.nbytes, lambda G=G, A=A: ops.unique_base_backward(G, A, lam, gamma)))

    x, seed = torch.randn(tokens, d, dtype=bf16, device=device), torch.tensor([1], device=device)
    found.append(("dropout bfloat16", 2 * x.nbytes, lambda: ops.dropout(x, seed, 0.1)))

    bases = randlora.RandomBases(d, d, r, kind="sparse")
    A, B = bases.draw(torch.int8, device)
    bits = list(patterns.StoredBits(A[:, 0], iter([B.flatten(1)]), d).of(d))
    found.append(("bits made dense", (d * n * r) * (2 + 0.25), lambda: ops.packed_expand(bits, n, d, d, bf16)))
    return found + hadamard_cases(device, d, tokens, r)


def hadamard_cases(device: torch.device, d: int, tokens: int, r: int) -> list[Case]:
    """Of which each has several kernels; `bytes` are those of tokens, parameters and results alone."""
    import randlora

    ops, bf16 = torch.ops.randlora, torch.bfloat16
    pattern = list(randlora.RandomBases(d, d, r, kind="hadamard").pattern(d, device)[0])
    lam, gamma = torch.randn(r, d // r, device=device), torch.randn(d // r, d, device=device) / d
    x, g, y = (torch.randn(tokens, d, dtype=bf16, device=device) for _ in range(3))
    parameters = pattern, lam, gamma, 1.0
    found: list[Case] = []
    for count in (tokens, 1):
        narrow, wide, into = (t[:count] for t in (x, g, y))
        size = 3 * narrow.nbytes + gamma.nbytes
        for name, op, given in (("up", ops.hadamard_up_, narrow), ("down", ops.hadamard_down_, wide)):
            call = functools.partial(op, into, given, *parameters)
            found.append((f"hadamard {name}, {count} tokens", size, call))
    call = functools.partial(ops.hadamard_gradients, x, g, y, None, *parameters)
    found.append(("hadamard gradients and dx", 4 * x.nbytes + 2 * gamma.nbytes, call))
    D = torch.randn(d, d, device=device)
    call = functools.partial(ops.hadamard_update, pattern, lam, gamma, d, 1.0, None, torch.float32)
    found.append(("hadamard dW float32", D.nbytes, call))
    call = functools.partial(ops.hadamard_update_backward, D, *parameters, True, True)
    found.append(("gradients of hadamard dW", D.nbytes, call))
    return found


def seconds(call: Callable[[], object], device: torch.device, flush: torch.Tensor) -> float:
    """Median over calls that find nothing in the L2 cache; on CUDA the device's own time."""
    samples = []
    for _ in range(ROUNDS if device.type == "cuda" else 1):
        flush.zero_()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(), call(), end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            call()
            samples.append(time.perf_counter() - begin)
    return statistics.median(samples)


def main(argv: list[str] | None = None) -> int:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ncu", action="store_true", help="one call each, between cudaProfilerStart and Stop")
        parser.add_argument("--features", type=int, default=4096, help="default: 4096")

    options = measure.parse("kernels", __doc__, argv, add=add)
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    found = cases(device, options.features, 2 * options.features)
    for _, _, call in found:
        call()
    if options.ncu:
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
        for _, _, call in found:
            call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
        return 0
    flush = torch.empty(256 << 20 if on_gpu else 1, dtype=torch.int8, device=device)
    rows = []
    for title, size, call in found:
        taken = seconds(call, device, flush)
        rows.append({"case": title, "MB": f"{size / 1e6:.1f}", "us": f"{1e6 * taken:.1f}",
                     "percent_of_3.35_TB_per_s": f"{100 * size / taken / BANDWIDTH:.0f}"})  # fmt: skip
        print("  ".join(rows[-1].values()))
    records.put_beside(options, "kernels", rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
