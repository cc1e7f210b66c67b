"""bench/memory.py: what it records of real steps, and what it makes of it."""

import inspect
import json
import pickle
import re
import shutil
import subprocess
import time
import types

import numpy as np
import pytest
import torch
from helpers.timelines import COLUMN, EVENTS, KNOWN, STEP, long_timeline
from torch import nn

import randlora
from bench import memory, timeline_views
from bench.timeline import ORIGINS, Step, attribute

# ---- a real model on the CPU ----


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(40, 72), nn.Linear(72, 24)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def test_a_real_step():
    """Totals are the profiler's; of each origin there is as much as the model says."""
    net, x = Net(), torch.randn(50, 40)
    weights = {memory.address(p) for p in net.parameters()}
    model = randlora.get_peft_model(net, randlora.RandLoraConfig(r=8, target_modules=["a", "b"]))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4
    optimizer = torch.optim.AdamW(trained)

    def loss():
        return model(x).square().mean()

    for _ in range(2):
        memory.take_step(loss, trained, optimizer)
    known = memory.known_storages(model, weights, optimizer, [x], torch.device("cpu"))
    with memory.cpu_history() as events:
        steps = [memory.take_step(loss, trained, optimizer) for _ in range(2)]
    found = attribute(events, known, steps)

    before = events[0].total - events[0].bytes
    constant = sum(storage.bytes for storage in known.values())
    assert found.total.tolist()[1:] == [constant + event.total - before for event in events]
    assert found.bytes[-1].tolist() == found.bytes[0].tolist()  # a step leaves nothing behind

    def bytes_of(tensors):
        return sum(t.nbytes for t in tensors)

    ours = bytes_of(trained)
    start = dict(zip(ORIGINS, found.bytes[0].tolist(), strict=True))
    assert start == {
        "weights": 4 * (40 * 72 + 72 + 72 * 24 + 24),
        "bases": model.model.a.bases["default"].nbytes,
        "adapter": ours,
        "optimizer": 2 * ours + 4 * len(trained),
        "gradients": 0,
        "activations": x.nbytes,
        "workspace": 0,
    }
    assert start["bases"] > 0
    for step in found.steps:
        after = [i for i, t in enumerate(found.time) if step.backward <= t < step.optimizer][-1]
        assert found.bytes[after, COLUMN["gradients"]] == ours
        assert found.bytes[after, COLUMN["activations"]] == x.nbytes + 4  # the loss
        turn = [i for i, t in enumerate(found.time) if t < step.backward][-1]
        # relu's result, which is b's input too; what mean and square keep; the loss.
        kept = found.bytes[turn, COLUMN["activations"]] - x.nbytes
        assert kept == 4 * (50 * 72 + 50 * 24 + 1)


def test_full_fine_tuning_trains_weights_and_frozen_models_have_no_optimizer():
    x = torch.randn(5, 40, requires_grad=True)
    for frozen in (False, True):
        net = Net().requires_grad_(not frozen)
        bytes_ = sum(p.nbytes for p in net.parameters())
        found = memory.record(net, lambda net=net: net(x).sum(), map(memory.address, net.parameters()), [x])
        most = dict(zip(ORIGINS, found.bytes.max(0).tolist(), strict=True))
        assert (most["weights"], most["adapter"]) == (bytes_, 0)
        assert most["gradients"] == (0 if frozen else bytes_)
        assert most["optimizer"] == (0 if frozen else 2 * bytes_ + 4 * 4)


# ---- without a CUDA device ----


def test_the_calls_of_cuda(monkeypatch, tmp_path):
    """Without a device: what is asked of torch.cuda exists in this form, and what comes back is used and written."""
    record_history = inspect.signature(torch.cuda.memory._record_memory_history)
    calls, trace = [], []

    def record(*arguments, **more):
        calls.append(record_history.bind(*arguments, **more).arguments["enabled"])

    def stats(device):
        return {"requested_bytes.all.current": 900, "requested_bytes.all.peak": 964}

    for name, stand_in in {"synchronize": id, "reset_peak_memory_stats": id, "memory_stats": stats}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", record)
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda device: {"segments": [], "device_traces": [[], trace]})
    x = torch.ones(1, requires_grad=True)

    def loss():
        for action in ("alloc", "free_completed"):
            trace.append({"action": action, "addr": 5, "size": 64, "time_us": time.time_ns() // 1000})
        return x.sum()

    dump = tmp_path / "deep" / "x.pickle"
    found = memory.record(nn.Identity(), loss, device="cuda:1", dump=dump)
    assert calls == ["all", None]
    assert pickle.loads(dump.read_bytes())["device_traces"][1] == trace
    assert found.bytes[:5, COLUMN["workspace"]].tolist() == [900, 964, 900, 964, 900]


# ---- pictures ----


def page_data(text):
    found = re.search(r"const data = (\{.*\});\n", text)
    return json.loads(found[1])


def test_the_page_is_one_small_file(tmp_path):
    found = {f"method {i}": long_timeline() for i in range(4)} | {"broken": "out of memory"}
    path = timeline_views.page(tmp_path / "x.html", "A </script> title", "machine", found)
    text = path.read_text()
    assert len(text.encode()) <= timeline_views.HTML_BYTES
    assert not re.search(r"https?:|src=|href=|@import|fetch\(", text)
    assert text.count("</script>") == 1
    data = page_data(text)
    assert data["title"] == "A </script> title" and data["failed"] == [["broken", "out of memory"]]
    for method in data["methods"]:
        columns = np.cumsum(method["bytes"], axis=1) * 1024
        assert len(method["time"]) > 100
        peak = columns.sum(0).max()
        assert abs(peak - sum(method["peak"]["bytes"])) <= 1024 * len(ORIGINS)
        assert np.cumsum(method["time"])[columns.sum(0).argmax()] == method["peak"]["time"]


def test_the_pages_program_is_javascript(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node")
    path = timeline_views.page(tmp_path / "x.html", "title", "", {"one": long_timeline(100)})
    program = tmp_path / "x.js"
    program.write_text(re.search(r"<script>(.*)</script>", path.read_text(), re.S)[1])
    done = subprocess.run([node, "--check", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_picture(tmp_path):
    found = {f"randlora {i}": long_timeline(500) for i in range(6)} | {"other": "ValueError: a long reason " * 4}
    path = timeline_views.picture(tmp_path / "deep" / "x.png", "title", found)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert timeline_views.picture(tmp_path / "none.png", "title", {"other": "out of memory"}).exists()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (3 << 20, "3 MiB"),
        (1008 << 20, "1008 MiB"),
        (5000 << 20, "4.88 GiB"),
    ],
)
def test_sizes_for_people(count, text):
    assert timeline_views.size(count) == text


# ---- the question ----


@pytest.fixture
def options(tmp_path):
    names = ("depth", "vocab", "batch", "tokens", "dtype", "targets", "only")
    return types.SimpleNamespace(
        command="", device="cpu", threads=1, huge_pages=False, quick=True, results=tmp_path, rank=4, model="MiniLM-L6",
        methods="PEFT LoRA; frozen; randlora; PEFT VeRA", **dict.fromkeys(names),
    )  # fmt: skip


def run(options, monkeypatch, outcomes):
    """The question with what is recorded replaced by `outcomes`: a timeline or an exception per method."""

    def record_method(name, *arguments):
        if isinstance(outcomes[name], BaseException):
            raise outcomes[name]
        return outcomes[name], 123

    monkeypatch.setattr(memory.measure, "parse", lambda *arguments, **more: options)
    monkeypatch.setattr(memory, "record_method", record_method)
    assert memory.main([]) == 0
    (path,) = options.results.glob("*/memory.csv")
    return path, memory.records.read(path)


def test_rows_failures_and_replacement(options, monkeypatch, capsys):
    outcomes = {
        "PEFT LoRA": RuntimeError(
            "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 9 bytes"
        ),
        "frozen": ValueError("no\nsecond line"),
        "randlora": attribute(EVENTS, KNOWN, [STEP]),
        "PEFT VeRA": torch.OutOfMemoryError("CUDA out of memory"),
    }
    path, rows = run(options, monkeypatch, outcomes)
    reasons = ["out of memory", "ValueError: no", "", "out of memory"]
    assert [(row["provider"], row["failed"]) for row in rows] == list(zip(outcomes, reasons, strict=True))
    row = rows[2]
    assert (row["peak_total_bytes"], row["peak_bytes"], row["peak_phase"]) == ("1476", "476", "backward")
    assert (row["gradients_bytes"], row["workspace_bytes"], row["trainable_parameters"]) == ("20", "32", "123")
    assert (row["model"], row["batch"], row["r"], row["mode"]) == ("MiniLM-L6", "4", "4", "quick")
    for suffix in ("png", "html"):
        assert (path.parent / "memory" / f"minilm-l6-6-layers-4x128-float32-r4-quick.{suffix}").stat().st_size > 1000

    outcomes["PEFT LoRA"] = attribute(EVENTS[:1], KNOWN, [Step(0, 100, 200, 300)])
    capsys.readouterr()
    _, again = run(options, monkeypatch, outcomes)
    assert (
        len(again) == 4 and again[0]["peak_total_bytes"] == "1424" and again[1] | {"date": ""} == rows[1] | {"date": ""}
    )
    assert 'replaces PEFT LoRA: "out of memory"' in "".join(capsys.readouterr())
    options.quick = False  # another key
    assert len(run(options, monkeypatch, outcomes)[1]) == 8


def test_stopping_keeps_what_is_there(options, monkeypatch):
    outcomes = {"PEFT LoRA": attribute(EVENTS, KNOWN, [STEP]), "frozen": KeyboardInterrupt()}
    path, rows = run(options, monkeypatch, outcomes)
    assert [row["provider"] for row in rows] == ["PEFT LoRA"]
    assert [
        m["name"]
        for m in page_data((path.parent / "memory" / "minilm-l6-6-layers-4x128-float32-r4-quick.html").read_text())[
            "methods"
        ]
    ] == ["PEFT LoRA"]
