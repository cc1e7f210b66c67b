"""What the tests of bench/timeline.py and bench/memory.py share; importing it skips where bench/ cannot be had."""

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench" / "memory.py").exists():
    pytest.skip("the benchmarks are not here", allow_module_level=True)
sys.path.append(str(ROOT))

from bench.timeline import ORIGINS, Event, Known, Step, Timeline  # noqa: E402

COLUMN = {origin: i for i, origin in enumerate(ORIGINS)}

# One step: forward from 0, backward from 100, optimizer from 200, until 300. Addresses are names.
STEP = Step(0, 100, 200, 300, frozenset({7}))
KNOWN = {1: Known(1000, "weights"), 2: Known(300, "bases"), 3: Known(20, "adapter"), 4: Known(40, "optimizer")}
EVENTS = [
    Event(10, 5, 64),  # kept for backward
    Event(20, 6, 16),
    Event(30, 6, -16),  # a temporary of the forward pass
    Event(105, 7, 12),
    Event(108, 7, -12),  # a temporary of the backward pass where a gradient will be
    Event(110, 8, 32),  # the gradient of an activation
    Event(120, 7, 20),  # a parameter's gradient
    Event(130, 5, -64),
    Event(140, 8, -32),
    Event(210, 5, 8),  # a temporary of the optimizer where an activation was
    Event(220, 5, -8),
    Event(290, 7, -20),
]
EXPECTED = {
    "activations": [0, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0],
    "gradients": [0, 0, 0, 0, 0, 0, 0, 20, 20, 20, 20, 20, 0],
    "workspace": [0, 0, 16, 0, 12, 0, 32, 32, 32, 0, 8, 0, 0],
}


def snapshot_of(events, **more):
    """What the CUDA allocator's snapshot of these events looks like, as torch documents it."""
    frame = {"filename": "model.py", "line": 3, "name": "forward"}
    entries = [{"action": "segment_alloc", "addr": 0, "size": 2 << 20, "stream": 0, "time_us": 0, "frames": []}]
    for event in events:
        for action in ("alloc",) if event.bytes > 0 else ("free_requested", "free_completed"):
            entries.append({
                "action": action, "addr": event.address, "size": abs(event.bytes), "stream": 0,
                "time_us": event.time, "frames": [frame],
            })  # fmt: skip
    entries.append({"action": "snapshot", "addr": 0, "size": 0, "stream": 0, "time_us": 400, "frames": []})
    return {"segments": [], "device_traces": [[], entries], **more}


def long_timeline(points=8000):
    rng = np.random.default_rng(0)
    table = np.zeros((points, len(ORIGINS)), dtype=np.int64)
    table[:, 0] = 50 << 20
    table[:, 5] = (np.sin(np.linspace(0, 12, points)) + 1) * (30 << 20)
    table[:, 6] = rng.integers(0, 10 << 20, points)
    table[points // 3, 4] = 90 << 20  # a short peak
    end = 1000 * points
    steps = tuple(Step(*(end * (4 * i + j) // 8 for j in range(4)), frozenset()) for i in range(2))
    return Timeline(np.arange(points) * 1000, table, steps)
