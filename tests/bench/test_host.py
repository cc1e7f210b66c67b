"""bench/host.py: every method of its cases computes the layer, and the clock counts calls."""

import argparse
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "transformers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from bench import host, measure, records  # noqa: E402
from bench.layer import Spec  # noqa: E402
from bench.measure import Provider  # noqa: E402

OPTIONS = argparse.Namespace(device="cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", [host.STEP, host.FORWARD])
def test_every_method_computes_the_layer(which, dtype):
    setup = host.case(Spec(host.D, 1, host.RANK, dtype=dtype, which=which), OPTIONS).set_up()
    assert ("PEFT LoRA, 16-bit" in setup.factories) == (dtype == "bfloat16")
    for name, factory in setup.factories.items():
        provider = factory()
        result = provider.call()
        assert provider.check(result) < 0.05, name
        assert result[0].requires_grad == (which == host.STEP), name


def test_the_layer_alone_is_called():
    """Not the model around it, which costs as much again."""
    made = host.Layer(Spec(host.D, 1, host.RANK))
    for name in host.NAMES[host.STEP]:
        if not name.endswith("16-bit"):
            assert isinstance(host.module(made, name), torch.nn.Linear) or hasattr(
                host.module(made, name), "base_layer"
            )


def test_the_clock_counts_calls():
    calls = []
    found = host.HostTimer("cpu").turn(Provider(lambda: calls.append(1)), 7)
    assert len(calls) == 8 and found >= 0  # one to warm up
    assert host.HostTimer("cpu").turn(Provider(lambda: calls.append(1)), 1) >= 0 and len(calls) == 9


def test_a_run_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "TURN_SECONDS", 0)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 3)
    arguments = ["--quick", "--results", str(tmp_path), "--no-picture", "--threads", str(torch.get_num_threads())]
    host.main([*arguments, "--only", "forward dense float32"])
    (path,) = tmp_path.glob("*/host.csv")
    rows = records.read(path)
    assert [row["provider"] for row in rows] == [name for name in host.NAMES[host.FORWARD] if "16-bit" not in name]
    assert all(row["median_ms"] and row["pass"] == "forward" and row["d"] == str(host.D) for row in rows)
