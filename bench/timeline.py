"""Who held how many bytes when: an allocator's events, told apart by where the bytes come from.

The events come from torch.profiler (CPU) or from the CUDA allocator's history; from there on both go one way. Nothing
here allocates on a device or looks at a model: `bench/memory.py` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# From the bottom of the stack to its top: first what stays, then what comes and goes.
ORIGINS = ("weights", "bases", "adapter", "optimizer", "gradients", "activations", "workspace")
PHASES = ("forward", "backward", "optimizer")


class Event(NamedTuple):
    """An allocation, or with negative `bytes` the end of one."""

    time: int  # ns
    address: int
    bytes: int
    total: int | None = None  # what the allocator itself counts after it, where it says so


class Known(NamedTuple):
    """A storage that exists before the first event."""

    bytes: int
    origin: str


class Step(NamedTuple):
    """When the phases of a training step began (ns), when it ended, and where the gradients lay after backward."""

    forward: int
    backward: int
    optimizer: int
    end: int
    gradients: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Timeline:
    """Bytes by origin over time: row ``i`` of `bytes` holds from ``time[i]`` until ``time[i + 1]``."""

    time: np.ndarray  # [points], ns since the first step began
    bytes: np.ndarray  # [points, len(ORIGINS)]
    steps: tuple[Step, ...]  # on the same clock

    @property
    def total(self) -> np.ndarray:
        return self.bytes.sum(1)

    @property
    def peak(self) -> int:
        """The first point at which most bytes are held."""
        return int(self.total.argmax())

    def phase(self, point: int) -> str:
        """The phase in which a point lies; "" between steps."""
        at = self.time[point]
        for step in self.steps:
            for name, start, end in zip(PHASES, step[:3], step[1:4], strict=True):
                if start <= at < end:
                    return name
        return ""


# ---- events ----


def profile_events(roots: Iterable[Any], device: str = "cpu") -> list[Event]:
    """The memory events of a profile in the order of time.

    Args:
        roots: ``profile.profiler.kineto_results.experimental_event_tree()`` of a ``torch.profiler.profile`` with
            ``profile_memory=True``.
    """
    found = []
    for node in walk(roots):
        fields = node.extra_fields
        if hasattr(fields, "alloc_size") and fields.device.type == device and fields.alloc_size:
            found.append(Event(node.start_time_ns, fields.ptr, fields.alloc_size, fields.total_allocated))
    return sorted(found, key=lambda event: event.time)


def walk(roots: Iterable[Any]) -> Iterator[Any]:
    """All nodes of a profile's event tree."""
    left = list(roots)
    while left:
        node = left.pop()
        yield node
        left.extend(node.children)


def snapshot_events(snapshot: Mapping[str, Any], device: int = 0) -> list[Event]:
    """The history in a snapshot of the CUDA allocator (``torch.cuda.memory._snapshot()``), oldest event first.

    A block counts until ``free_completed``: before that no other tensor can have its memory. Sizes are those asked for,
    without the allocator's rounding.

    Raises:
        ValueError: the snapshot has no history of `device`, or its entries carry no times.
    """
    traces = snapshot.get("device_traces", [])
    if device >= len(traces) or not traces[device]:
        raise ValueError(f"the snapshot has no history of device {device}: record it with _record_memory_history()")
    signs = {"alloc": 1, "free_completed": -1}
    entries = [entry for entry in traces[device] if entry["action"] in signs]
    if any("time_us" not in entry for entry in entries):
        raise ValueError("the snapshot's entries have no time_us: this PyTorch is too old")
    return [
        Event(1000 * int(entry["time_us"]), entry["addr"], signs[entry["action"]] * entry["size"])
        for entry in entries
        if entry["size"]
    ]


# ---- attribution ----


def attribute(events: Sequence[Event], known: Mapping[int, Known], steps: Sequence[Step], rest: int = 0) -> Timeline:
    """Bytes by origin after each event.

    Storages in `known` are what they are said to be until they are freed. Of what is allocated later, a storage that
    holds a gradient when backward is over is a gradient; what a forward allocated and is still there when its backward
    begins is activations; all else is workspace, such as gradients of activations, temporaries of the optimizer, and
    activations that checkpointing computes again.

    Args:
        known: address -> storages that exist before the first event.
        rest: bytes that exist as well, but nobody knows of; they count as workspace.

    Raises:
        ValueError: a gradient lies where no event put anything, so that events are missing or clocks disagree.
    """
    if not steps:
        raise ValueError("steps must hold at least one Step, got none")
    column = {origin: i for i, origin in enumerate(ORIGINS)}
    table = np.zeros((len(events) + 1, len(ORIGINS)), dtype=np.int64)
    workspace = column["workspace"]
    table[0, workspace] = rest
    live: dict[int, tuple[int, int, int]] = {}  # address -> event that began it (0: known), its bytes, its column
    for address, (size, origin) in known.items():
        table[0, column[origin]] += size
        live[address] = (0, size, column[origin])
    held = set()  # (step, address) of gradients that were found

    def end(address: int, at: int) -> None:
        begun, size, place = live.pop(address)
        if begun:
            place = column[_origin(events[begun - 1], events[at - 1].time if at <= len(events) else None, steps, held)]
            table[begun, place] += size
        if at <= len(events):
            table[at, place] -= size

    for i, event in enumerate(events, start=1):
        if event.bytes > 0:
            if event.address in live:  # its end was not reported: of something that is older than the events
                end(event.address, i)
            live[event.address] = (i, event.bytes, workspace)
        elif event.address in live:
            end(event.address, i)
        else:
            table[i, workspace] += event.bytes
    for address in list(live):
        end(address, len(events) + 1)

    wanted = {(i, a) for i, step in enumerate(steps) for a in step.gradients if a not in known}
    if wanted - held:
        raise ValueError(
            f"{len(wanted - held)} of {len(wanted)} gradients lie where no event allocated anything: "
            "events are missing, or their clock is not the steps'"
        )
    start = steps[0].forward
    shifted = tuple(Step(*(t - start for t in step[:4]), step.gradients) for step in steps)
    times = np.array([0, *(max(0, event.time - start) for event in events)], dtype=np.int64)
    return Timeline(times, table.cumsum(0), shifted)


def _origin(event: Event, end: int | None, steps: Sequence[Step], held: set[tuple[int, int]]) -> str:
    """Of a storage that `event` allocated and that was freed at `end` (None: not yet)."""
    for i, step in enumerate(steps):
        in_passes = step.forward <= event.time < step.optimizer
        if in_passes and event.address in step.gradients and (end is None or end >= step.optimizer):
            held.add((i, event.address))
            return "gradients"
        if step.forward <= event.time < step.backward and (end is None or end >= step.backward):
            return "activations"
    return "workspace"


# ---- fewer points ----


def thin(timeline: Timeline, limit: int) -> tuple[Timeline, int]:
    """At most `limit` points with the same peak, and the error in bytes: at no time is any origin off by more.

    Raises:
        ValueError: `limit` below 3, the first point, the peak and the last one.
    """
    if limit < 3:
        raise ValueError(f"limit must be at least 3, got {limit}")
    rows, points = timeline.bytes, len(timeline.time)
    kept, error = np.arange(points), 0
    must = {0, timeline.peak, points - 1}
    while len(kept) > limit:
        error = 2 * error or max(1, int(timeline.total.max()) >> 14)
        kept = _changes(rows, error, must)
    return Timeline(timeline.time[kept], rows[kept], timeline.steps), error


def _changes(rows: np.ndarray, error: int, must: set[int]) -> np.ndarray:
    """The points at which some origin has moved by more than `error` since the one kept before."""
    kept, last = [], rows[0]
    for i, row in enumerate(rows):
        if i in must or np.abs(row - last).max() > error:
            kept.append(i)
            last = row
    return np.array(kept)
