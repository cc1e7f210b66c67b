"""bench/quantized.py: every method computes the quantised layer, and a package that is missing is a row."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "transformers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from bench import measure, quantized, records  # noqa: E402
from bench.layer import Spec  # noqa: E402
from bench.quantized import ONE_TOKEN, STEP, Quantized  # noqa: E402

HERE = ["none"]
HERE += ["nf4"] if importlib.util.find_spec("bitsandbytes") else []
HERE += ["int8", "int4"] if importlib.util.find_spec("torchao") else []
over_kinds = pytest.mark.parametrize("base", HERE)
D = 128


def spec(which, dtype="float32"):
    return Spec(D, 24 if which == STEP else 1, 8, dtype=dtype, which=which)


@over_kinds
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", [STEP, ONE_TOKEN])
def test_every_method_computes_the_layer(base, which, dtype):
    made = Quantized(base, spec(which, dtype))
    numbers = quantized.numbers_of(made.quantize())
    assert (base == "none") == torch.equal(numbers, made.plain.weight)
    names = quantized.names_of(made.spec)
    assert ("PEFT LoRA, 16-bit" in names) == (dtype == "bfloat16")
    for name in names:
        provider = made.provider(name)
        result = provider.call()
        assert provider.check(result) < 0.02, name
        assert result[0].requires_grad == (which == STEP), name


@over_kinds
def test_a_wrong_layer_is_noticed(base, monkeypatch):
    made = Quantized(base, spec(ONE_TOKEN))
    adapted = made.make("randlora")
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2)
    monkeypatch.setattr(made, "make", lambda name: adapted)
    provider = made.provider("randlora")
    with pytest.raises(AssertionError, match="relative errors"):
        provider.check(provider.call())


@pytest.mark.skipif("int8" not in HERE, reason="torchao is not installed")
def test_products_stay_exact():
    """torchao's settings for the compiler would allow TF32 to all that is measured later."""
    before = torch.get_float32_matmul_precision()
    for base in ("int8", "int4"):
        Quantized(base, spec(STEP)).quantize()
    assert torch.get_float32_matmul_precision() == before


def recorded(folder, *arguments):
    common = ["--quick", "--seconds", "0", "--d", str(D), "--tokens", "8", "--no-picture", "--results", str(folder)]
    assert quantized.main([*common, "--threads", str(torch.get_num_threads()), *arguments]) == 0
    (path,) = folder.glob("*/quantized.csv")
    return records.read(path)


def test_a_run_is_recorded(tmp_path):
    rows = recorded(tmp_path, "--kinds", ",".join(HERE))
    assert list(dict.fromkeys(row["base"] for row in rows)) == HERE
    assert all(row["median_ms"] and not row["failed"] for row in rows)
    assert {(row["pass"], row["T"]) for row in rows} == {(STEP, "8"), (ONE_TOKEN, "1")}


def test_what_cannot_be_had_is_said(tmp_path, monkeypatch):
    """A package, or a kind that is for GPUs; the others are measured."""
    for package in ("bitsandbytes", "torchao"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(measure, "MAX_ROUNDS", 3)
    rows = recorded(tmp_path, "--kinds", "nf4,int4 packed,none", "--methods", "frozen")
    said = {row["base"]: row["failed"] for row in rows}
    assert "bitsandbytes" in said["nf4"] and "torchao" in said["int4 packed"]
    assert said["none"] == "" and len(rows) == 6
