"""bench/timeline.py: every byte has one origin, and together they are what the allocator counts."""

import random

import numpy as np
import pytest
from helpers.timelines import COLUMN, EVENTS, EXPECTED, KNOWN, STEP, long_timeline, snapshot_of

from bench import timeline
from bench.timeline import ORIGINS, Event, Step, attribute, thin

# ---- attribution ----


def test_every_origin():
    found = attribute(EVENTS, KNOWN, [STEP])
    for origin in ORIGINS:
        constant = sum(known.bytes for known in KNOWN.values() if known.origin == origin)
        expected = EXPECTED.get(origin, [constant] * (len(EVENTS) + 1))
        assert found.bytes[:, COLUMN[origin]].tolist() == expected, origin
    assert found.time.tolist() == [0, *(event.time for event in EVENTS)]
    assert found.total.max() == 1360 + 64 + 20 + 32 and found.peak == 7
    assert [found.phase(i) for i in (1, 7, 10)] == ["forward", "backward", "optimizer"]


def test_times_count_from_the_first_step():
    shifted = [event._replace(time=event.time + 10**18) for event in EVENTS]
    step = Step(*(t + 10**18 for t in STEP[:4]), STEP.gradients)
    found = attribute(shifted, KNOWN, [step])
    assert found.time.tolist() == [0, *(event.time for event in EVENTS)]
    assert found.steps[0] == STEP and found.phase(found.peak) == "backward"


def test_what_lives_on_counts_to_the_end():
    found = attribute(EVENTS[:7], KNOWN, [STEP])
    assert found.bytes[-1].tolist() == [1000, 300, 20, 40, 20, 64, 32]


@pytest.mark.parametrize("seed", range(20))
def test_the_sum_is_the_allocators_count(seed):
    """Whatever happens when: no byte is lost or counted twice."""
    rng = random.Random(seed)
    steps = [Step(1000 * i, 1000 * i + 300, 1000 * i + 700, 1000 * i + 900) for i in range(2)]
    live, events, total = {}, [], 0
    for at in sorted(rng.randrange(2000) for _ in range(300)):
        if live and rng.random() < 0.5:
            address = rng.choice(sorted(live))
            change = -live.pop(address)
        else:
            address, change = rng.choice([a for a in range(10, 400) if a not in live]), rng.randrange(1, 1000)
            live[address] = change
        total += change
        events.append(Event(at, address, change, total))
    found = attribute(events, KNOWN, steps, rest=5)
    assert found.total.tolist() == [1365] + [1365 + event.total for event in events]
    assert (found.bytes >= 0).all()
    assert found.bytes[:, COLUMN["activations"]].any() and found.bytes[:, COLUMN["workspace"]].any()


def test_a_known_storage_ends_when_it_is_freed_or_its_place_is_taken():
    found = attribute([Event(10, 2, -300), Event(20, 1, 50)], KNOWN, [Step(0, 100, 200, 300)])
    assert found.bytes[:, COLUMN["bases"]].tolist() == [300, 0, 0]
    assert found.bytes[:, COLUMN["weights"]].tolist() == [1000, 1000, 0]
    assert found.bytes[:, COLUMN["activations"]].tolist() == [0, 0, 50]


def test_an_unknown_end_is_taken_from_the_rest():
    found = attribute([Event(10, 99, -30)], KNOWN, [Step(0, 100, 200, 300)], rest=100)
    assert found.bytes[:, COLUMN["workspace"]].tolist() == [100, 70]


def test_a_gradient_that_nothing_allocated_is_an_error():
    step = STEP._replace(gradients=frozenset({7, 77}))
    with pytest.raises(ValueError, match="1 of 2 gradients lie where no event allocated anything"):
        attribute(EVENTS, KNOWN, [step])
    with pytest.raises(ValueError, match="at least one Step"):
        attribute(EVENTS, KNOWN, [])


# ---- CUDA's form ----


def test_a_snapshot_gives_the_same_timeline():
    found = timeline.snapshot_events(snapshot_of(EVENTS), 1)
    assert found == [event._replace(time=1000 * event.time) for event in EVENTS]  # from microseconds
    step = Step(*(1000 * t for t in STEP[:4]), STEP.gradients)
    assert (attribute(found, KNOWN, [step]).bytes == attribute(EVENTS, KNOWN, [STEP]).bytes).all()


def test_the_snapshot_is_one_that_torch_reads():
    viewer = pytest.importorskip("torch.cuda._memory_viz")
    text = viewer.trace(snapshot_of(EVENTS))
    assert text.count("= cudaMalloc") + text.count("new_segment") >= 1 and text.count("del ") >= 4


def test_a_block_counts_until_its_free_is_completed():
    snapshot = snapshot_of([Event(10, 5, 64), Event(30, 5, -64)])
    entries = snapshot["device_traces"][1]
    requested = next(i for i, entry in enumerate(entries) if entry["action"] == "free_requested")
    entries.insert(requested + 1, {"action": "alloc", "addr": 6, "size": 8, "time_us": 20})
    found = attribute(timeline.snapshot_events(snapshot, 1), {}, [Step(0, 10**6, 2 * 10**6, 3 * 10**6)])
    assert found.total.tolist() == [0, 64, 72, 8]


def test_snapshots_that_cannot_be_used():
    with pytest.raises(ValueError, match="no history of device 0"):
        timeline.snapshot_events(snapshot_of(EVENTS), 0)
    snapshot = snapshot_of(EVENTS)
    del snapshot["device_traces"][1][2]["time_us"]
    with pytest.raises(ValueError, match="no time_us"):
        timeline.snapshot_events(snapshot, 1)


# ---- fewer points ----


@pytest.mark.parametrize("limit", [3, 50, 1000, 100_000])
def test_thinning_keeps_the_peak_and_its_promise(limit):
    whole = long_timeline(2000)
    found, error = thin(whole, limit)
    assert len(found.time) <= limit
    assert found.time[found.peak] == whole.time[whole.peak] and found.total.max() == whole.total.max()
    shown = found.bytes[np.searchsorted(found.time, whole.time, side="right") - 1]
    assert np.abs(shown - whole.bytes).max() <= error
    assert (error == 0) == (limit >= 2000)


def test_thinning_to_nothing():
    with pytest.raises(ValueError, match="at least 3, got 2"):
        thin(long_timeline(10), 2)
