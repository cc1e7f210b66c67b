"""python -m bench report: what it makes of CSV files, and of nothing else."""

import csv
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("matplotlib", "tqdm"):
    pytest.importorskip(package)

from bench import plots, report, report_tables  # noqa: E402
from bench.timeline import ORIGINS  # noqa: E402

LINEAR = report.STEP


def row(case, provider, ms="", baseline="PEFT RandLoRA", times="", mode="full", failed="", **more):
    """As bench/records.py writes them."""
    return {
        **case, "provider": provider, "device": "cpu", "threads": "2", "pages": "default", "mode": mode,
        "median_ms": ms, "q20_ms": ms, "q80_ms": ms, "baseline": baseline, "times_faster": times, "samples": "9",
        "failed": failed, **more, "load": "1.5", "command": "python -m bench some --d 64", "date": "2026-01-02 03:04",
        "commit": "abcdef1234", "randlora": "0.1.0", "torch": "2.13.0", "peft": "0.21.2", "cpu": "A CPU",
        "cpu_capability": "avx512", "gpu": "", "driver": "",
    }  # fmt: skip


def write(folder, name, rows):
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for r in rows for column in r))
    with (folder / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "a-cpu-2-cores"
    floor = {"floor_ms": "40", "copy_GB_per_s": "12.5", "product_G_per_s": "80", "bases_bytes": ""}
    other = LINEAR | {"T": "4096"}
    write(folder, "linear", [
        row(LINEAR, "PEFT RandLoRA", "100", times="1", reached="0.4", saved_bytes=str(16 << 20), **floor),
        row(LINEAR, "randlora", "50", times="2", reached="0.8", saved_bytes=str(4 << 20), **floor),
        row(LINEAR, "randlora", "7", times="9", mode="quick", reached="0.9", saved_bytes="1", **floor),
        row(LINEAR, "PyTorch, compiled", failed="out of memory"),
        row(other, "PEFT RandLoRA", "1500", times="1", reached="0.3", **floor),
        row(other, "randlora", "600", times="2.5", reached="0.7", **floor),
        row(LINEAR | {"d": "64"}, "randlora", "1", mode="quick"),
    ])  # fmt: skip
    write(folder, "linear-grid", [
        row(LINEAR | {"T": T}, name, ms, baseline="randlora")
        for T, times in (("16", ("1.0", "1.02", "2")), ("256", ("5", "6", "4")))
        for name, ms in zip(("randlora", "randlora factored", "randlora merged"), times, strict=True)
    ])  # fmt: skip
    density = {"d": "64", "T": "32", "r": "8", "sparsity": "sweep"}
    names = ("dense", "z = 1", "z = 4", "PEFT RandLoRA", "PEFT LoRA")
    write(folder, "density", [row(density, name, "5", bases_bytes="1048576") for name in names])
    size = {"model": "MiniLM-L6", "depth": "6/6", "vocab": "9/9", "batch": "16", "tokens": "128", "dtype": "float32",
            "targets": "all-linear", "r": "32"}  # fmt: skip
    write(folder, "model", [
        row(size, "randlora", "2370", baseline="PEFT LoRA", times="1", peak_bytes=str(100 << 20)),
        row(size, "PEFT LoRA", "2371", baseline="PEFT LoRA", times="1"),
    ])  # fmt: skip
    peak = {f"{origin}_bytes": str(1 << 20) for origin in ORIGINS} | {"peak_total_bytes": str(7 << 20)}
    write(folder, "memory", [row(size, "randlora", **peak), row(size, "PEFT LoRA", failed="out of memory")])
    about = {"cpu": "A CPU", "cores": 2, "memory_GiB": 8, "transparent_hugepages": "madvise", "system": "Linux",
             "python": "3.11", "gpu": None}  # fmt: skip
    (folder / "machine.json").write_text(json.dumps(about))
    return tmp_path


def lines(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_readme_rows_have_values_and_commands(results):
    text = report.write(results).read_text()
    (step,) = lines(text, "| a layer's training step")
    assert step == (
        "| a layer's training step, d = 1024, T = 1024 / 4096 | 50.0 ms / 600 ms | 100 ms / 1.50 s |  "
        "| `python -m bench some --d 64` |"
    )
    (model,) = lines(text, "| a training step of MiniLM")
    assert "16 x 128 tokens | 2.37 s |  | 2.37 s |" in model
    (kept,) = lines(text, "| kept for backward by that layer")
    assert "| 4.00 MiB / ? | 16.0 MiB / ? |" in kept
    assert not lines(text, "| bases for")  # not measured


def test_tables_say_what_they_depend_on(results):
    text = report.write(results).read_text()
    section = text[text.index("### linear:") : text.index("### linear-grid")]
    assert "`python -m bench some --d 64`" in section
    for said in ("A CPU (avx512)", "threads: 2", "default pages", "torch 2.13.0", "peft 0.21.2", "commit abcdef1234",
                 "2026-01-02", "load up to 1.5", "12.5 GB/s in a copy, 80.0 G multiply-adds/s"):  # fmt: skip
        assert said in section, said
    assert "50.0 ms (2.00x, 80%)" in section and "100 ms (40%)" in section and "| 4.00 / - |" in section
    assert "9.00x" not in section  # a quick run that a full one has replaced
    assert "a quick run" in section  # of another case
    assert "- PyTorch, compiled, T = 1024: out of memory" in section


def test_pictures_exist_and_lie_beside(results):
    text = report.write(results).read_text()
    names = [line.partition("](")[2].rstrip(")") for line in lines(text, "![")]
    assert len(names) >= 4 and all((results / name).stat().st_size > 1000 for name in names)


def test_grid_and_memory(results):
    text = report.write(results).read_text()
    assert "in 1 of 2 cases; the worst is +25.0%" in text
    memory = text[text.index("### memory") :]
    assert "| randlora | 7.00 |" in memory and "| PEFT LoRA | out of memory |" in memory


def test_written_again_it_is_the_same(results):
    assert report.write(results).read_text() == report.write(results).read_text()


def test_no_results(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        report.write(tmp_path)


def test_old_columns(tmp_path):
    """Rows of before there was a command, a load or a floor."""
    old = {
        k: v for k, v in row({"dtype": "float32", "d": "64"}, "randlora", "5").items() if k not in ("command", "load")
    }
    write(tmp_path / "m", "linear", [old])
    assert "`python -m bench linear`" in report.write(tmp_path).read_text()


@pytest.mark.parametrize(
    "value, text",
    [(0.01234, "0.0123"), (1.5, "1.50"), (73.26, "73.3"), (999.9, "1,000"), (0, "0"), (12345.6, "12,346")],
)
def test_number(value, text):
    assert report_tables.number(value) == text


def test_milliseconds():
    assert report_tables.milliseconds(9.7) == "9.70 ms" and report_tables.milliseconds(2371) == "2.37 s"


def test_every_csv_of_a_question_is_known():
    from bench.__main__ import LONG, QUESTIONS

    assert set(report.FILES.values()) == {*QUESTIONS, *LONG}
    assert set(plots.DRAWN_AS) < set(report.FILES)
