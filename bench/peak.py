"""Memory at the peak of a call: the count of a process of its own on the CPU, the allocator's on CUDA."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def above_result(build: Callable[..., Callable[[], Any]], arguments: tuple, small: tuple, device: str = "cpu") -> int:
    """Bytes that a call takes at its peak beyond the tensors it returns.

    ``build(*arguments)`` must be importable by name and returns the call; ``build(*small)`` is a smaller case that
    loads what loads at first use. CPU: Linux only.
    """
    if torch.device(device).type == "cuda":
        return _above_result_cuda(build(*arguments), device)
    return in_a_process(_above_result, torch.get_num_threads(), build, arguments, small)


def _above_result(threads: int, build: Callable[..., Callable[[], Any]], arguments: tuple, small: tuple) -> int:
    torch.set_num_threads(threads)
    build(*small)()
    call = build(*arguments)
    before = start_counting()
    result = call()
    return status_bytes("VmHWM") - before - _bytes(result)


def _above_result_cuda(call: Callable[[], Any], device: str) -> int:
    call()  # libraries' workspaces come with the first one
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    return torch.cuda.max_memory_allocated(device) - before - _bytes(result)


def _bytes(tensors: Any) -> int:
    return sum(t.nbytes for t in tensors)


def start_counting() -> int:
    """Sets the process's high-water mark to what is in use now, and returns that.

    Not getrusage's: ru_maxrss cannot be reset, and a process starts with the one of the process that started it.
    """
    gc.collect()
    if hasattr(trim := ctypes.CDLL(None), "malloc_trim"):
        trim.malloc_trim(0)  # what was freed, so that the call has to take it again
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def in_a_process(function: Callable[..., int], *arguments: Any) -> int:
    """What `function` returns in a process of its own.

    Raises:
        MemoryError: the process ended without a word, as one does that the system stops for its memory.
        RuntimeError: whatever `function` raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "peft"])  # imported once for all
    ours, its = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(its, function, *arguments))
    process.start()
    its.close()
    try:
        result = ours.recv()
    except EOFError:
        process.join()
        raise MemoryError(f"its process ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send(pipe: Any, function: Callable[..., int], *arguments: Any) -> None:
    try:
        pipe.send(function(*arguments))
    except Exception as problem:
        pipe.send(RuntimeError(f"{type(problem).__name__}: {problem}"))
