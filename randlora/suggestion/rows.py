"""What was measured. Written by ``python -m bench.quality.evidence``, not by hand; a test compares it."""

from __future__ import annotations

from .evidence import Row

ROWS: tuple[Row, ...] = (
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="best head", baseline=True,
        rate=None, score=0.726, spread=None, seeds=1,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="full fine-tuning", baseline=False,
        rate=0.0002, score=0.7445, spread=0.013811, seeds=3,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="PEFT LoRA r=8", baseline=False,
        rate=0.002, score=0.74883, spread=0.0030139, seeds=3,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="dense r=32", baseline=False,
        rate=0.0025, score=0.7305, spread=0.013444, seeds=3,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="hadamard r=32", baseline=False,
        rate=0.0009, score=0.74883, spread=0.0032532, seeds=3,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="PEFT LoRA r=32", baseline=False,
        rate=0.002, score=0.74483, spread=0.011372, seeds=3,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="PEFT RandLoRA r=32", baseline=False,
        rate=0.001, score=0.74833, spread=0.0079739, seeds=3,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="hadamard r=8", baseline=False,
        rate=0.0009, score=0.752, spread=0.0032787, seeds=3,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
    Row(task="tweets", metric="accuracy", larger_is_better=True, method="hadamard r=128", baseline=False,
        rate=0.0025, score=0.73733, spread=0.013531, seeds=3,
        source="bench/results/amd-epyc-avx512-2-cores/quality.csv"),
)  # fmt: skip
