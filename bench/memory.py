"""Memory over time in training steps of a model: which method holds how much, where does it come from, when?

Two steps (forward, backward, AdamW) after a warm-up; every byte is weights, bases, adapter, optimizer, gradients,
activations or workspace, as ``bench/timeline.py`` tells them apart. Drawn are one PNG per model with the methods side
by side and one HTML file to look into, both in ``bench/results/<machine>/memory/``; the peaks go to ``memory.csv``.

CPU: torch.profiler's memory events, which see what is allocated as tensors, and nothing that a library keeps to itself.
CUDA: the allocator's history, also written as a .pickle for https://pytorch.org/memory_viz; sizes without its rounding.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python bench/memory.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else every profile writes two lines

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity
from tqdm import tqdm

from bench import measure, methods, records, timeline, timeline_views
from bench import model as question
from bench.methods import METHODS, Setting
from bench.shapes import PUBLISHED, Shape, Size
from bench.timeline import ORIGINS, Event, Known, Step, Timeline
from bench.timeline_views import size as text_of

DEFAULT_METHODS = (methods.FULL, "PEFT LoRA", "PEFT RandLoRA", "randlora", "randlora very_sparse")
WARM_UP, STEPS = 2, 2


# ---- recording ----


def record(
    model: nn.Module,
    loss: Callable[[], Tensor],
    weights: Iterable[int] = (),
    inputs: Iterable[Tensor] = (),
    device: str = "cpu",
    dump: Path | None = None,
) -> Timeline:
    """Memory over :data:`STEPS` training steps of what is trainable in `model`, after :data:`WARM_UP` steps.

    Args:
        loss: a forward pass.
        weights: addresses of the storages that the model had before it was adapted.
        inputs: what `loss` reads; counted as activations.
        dump: CUDA: where the allocator's history goes as well.
    """
    device = torch.device(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    for _ in range(WARM_UP):
        take_step(loss, trained, optimizer)
    gc.collect()
    known = known_storages(model, set(weights), optimizer, inputs, device)
    if device.type == "cpu":
        with cpu_history() as events:
            steps = [take_step(loss, trained, optimizer) for _ in range(STEPS)]
        return timeline.attribute(events, known, steps)
    # Libraries' workspaces, such as cuBLAS', come from the allocator as well.
    now = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    rest = max(0, now - sum(storage.bytes for storage in known.values()))
    torch.cuda.reset_peak_memory_stats(device)
    with cuda_history(device, dump) as events:
        steps = [take_step(loss, trained, optimizer) for _ in range(STEPS)]
    found = timeline.attribute(events, known, steps, rest)
    counted = torch.cuda.memory_stats(device)["requested_bytes.all.peak"]
    if abs(counted - found.total.max()) > 0.01 * counted:
        tqdm.write(f"  the allocator counted a peak of {text_of(counted)}, its history {text_of(found.total.max())}")
    return found


def take_step(loss: Callable[[], Tensor], trained: list[nn.Parameter], optimizer: Any) -> Step:
    """A training step, and when its phases began, on the clock that stamps the events of both devices."""
    start = time.time_ns()
    value = loss()
    forward_done = time.time_ns()
    value.backward()
    gradients = frozenset(address(p.grad) for p in trained if p.grad is not None and p.grad.numel())
    backward_done = time.time_ns()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    del value
    return Step(start, forward_done, backward_done, time.time_ns(), gradients)


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def known_storages(
    model: nn.Module, weights: set[int], optimizer: Any, inputs: Iterable[Tensor], device: torch.device
) -> dict[int, Known]:
    """Address -> what exists on `device` between two steps. A storage with several names counts once."""
    found: dict[int, Known] = {}

    def add(origin: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            bytes_ = tensor.untyped_storage().nbytes()
            if tensor.device.type == device.type and bytes_:
                found.setdefault(address(tensor), Known(bytes_, origin))

    own = [*model.parameters(), *model.buffers()]
    add("weights", (tensor for tensor in own if address(tensor) in weights))
    add("bases", methods.bases(model))
    add("adapter", (parameter for parameter in model.parameters() if parameter.requires_grad))
    states = optimizer.state.values() if optimizer is not None else ()
    add("optimizer", (value for state in states for value in state.values() if isinstance(value, Tensor)))
    add("activations", inputs)
    add("weights", own)
    return found


@contextlib.contextmanager
def cpu_history() -> Iterator[list[Event]]:
    """The list is filled when the context ends."""
    events: list[Event] = []
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        yield events
    events += timeline.profile_events(profile.profiler.kineto_results.experimental_event_tree())


@contextlib.contextmanager
def cuda_history(device: torch.device, dump: Path | None) -> Iterator[list[Event]]:
    events: list[Event] = []
    torch.cuda.synchronize(device)
    torch.cuda.memory._record_memory_history("all", stacks="python", clear_history=True)
    try:
        yield events
        torch.cuda.synchronize(device)
        snapshot = torch.cuda.memory._snapshot(device)
    finally:
        torch.cuda.memory._record_memory_history(None)
    if dump is not None:
        dump.parent.mkdir(parents=True, exist_ok=True)
        dump.write_bytes(pickle.dumps(snapshot))
    index = torch.cuda.current_device() if device.index is None else device.index
    events += timeline.snapshot_events(snapshot, index)


def record_method(
    name: str, shape: Shape, size: Size, setting: Setting, device: str, dump: Path | None
) -> tuple[Timeline, int]:
    """The timeline of one method on a model of its own, and the number of trainable parameters."""
    model = shape.build(size.depth, size.vocab, dtype=size.dtype, device=device)
    weights = [address(tensor) for tensor in (*model.parameters(), *model.buffers())]
    inputs = shape.inputs(size, device)
    adapted = METHODS[name](model, setting)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    found = record(adapted, lambda: shape.loss(adapted, inputs), weights, inputs.values(), device, dump)
    return found, trained


# ---- results ----


def columns(found: Timeline) -> dict[str, Any]:
    """Of the CSV. ``peak_bytes`` is above the frozen model's weights, as in model.csv; ``peak_total_bytes`` is all."""
    at_peak = dict(zip(ORIGINS, found.bytes[found.peak].tolist(), strict=True))
    total = sum(at_peak.values())
    return {
        "peak_total_bytes": total,
        "peak_bytes": total - at_peak["weights"],
        "peak_phase": found.phase(found.peak),
    } | {f"{origin}_bytes": count for origin, count in at_peak.items()}


def table(found: Mapping[str, Timeline | str]) -> str:
    """Bytes by origin at each method's peak, as a person reads them."""
    width = max(map(len, found))
    lines = ["  " + " ".join([f"{'':{width}}", f"{'peak':>11}", *(f"{origin:>11}" for origin in ORIGINS)])]
    for name, one in found.items():
        if isinstance(one, str):
            lines.append(f"  {name:{width}} {one}")
        else:
            counts = [one.total[one.peak], *one.bytes[one.peak]]
            lines.append("  " + " ".join([f"{name:{width}}", *(f"{text_of(count):>11}" for count in counts)]))
    return "\n".join(lines)


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def profile(book: records.Book, options: Any, shape: Shape, size: Size, setting: Setting, title: str) -> bool:
    """One model under all methods; False after Ctrl-C."""
    names = question.chosen(options.methods, METHODS, DEFAULT_METHODS, ";", "method")
    case = question.columns(shape, size, setting)
    which = f"{shape.name} {size.depth} layers {size.batch}x{size.tokens} {case['dtype']} r{setting.rank}"
    stem = book.path.parent / "memory" / slug(which + (" quick" if options.quick else ""))
    found: dict[str, Timeline | str] = {}
    go_on = True
    bar = tqdm(names, desc=shape.name, unit="method", leave=False, disable=None)
    for name in bar:
        bar.set_postfix_str(name)
        dump = stem.with_name(f"{stem.name}-{slug(name)}.pickle") if book.run["device"] == "cuda" else None
        try:
            found[name], trained = record_method(name, shape, size, setting, options.device, dump)
        except KeyboardInterrupt:
            tqdm.write(f"{title}: stopped; what has been recorded is kept")
            go_on = False
            break
        except Exception as problem:
            found[name] = measure.reason(problem)
            row = {"failed": found[name]}
        else:
            row = columns(found[name]) | {"trainable_parameters": trained, "failed": ""}
        book.put(case, {name: row})
        torch.compiler.reset()
        gc.collect()
        if book.run["device"] == "cuda":
            torch.cuda.empty_cache()
    if found:
        print(table(found))
        about = book.environment
        machine = f"{about['gpu'] or about['cpu']}, {options.threads} threads"
        versions = ", ".join(f"{package} {about[package]}" for package in ("randlora", "torch", "peft"))
        heading, below = f"Memory of training steps: {title}", f"{machine}, {versions}, {about['date'][:10]}"
        # Not with_suffix: names of models have dots.
        for view in (
            timeline_views.picture(stem.with_name(stem.name + ".png"), f"{heading}\n{below}", found),
            timeline_views.page(stem.with_name(stem.name + ".html"), heading, below, found),
        ):
            print(f"  {view}")
    return go_on


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("memory", __doc__, argv, add=question.add_options)
    book = records.Book("memory", question.KEY, options)
    for shape, size, setting, title in question.models(options, question.QUICK_MODELS if options.quick else PUBLISHED):
        if options.only and options.only not in title:
            continue
        print(title)
        if not profile(book, options, shape, size, setting, title):
            break
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
