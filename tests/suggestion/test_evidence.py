"""What is said to have been measured, against where it stands."""

import csv
import dataclasses
import sys
from pathlib import Path

import pytest

from randlora.suggestion.evidence import Row, about, gains
from randlora.suggestion.rows import ROWS
from randlora.suggestion.text import WIDTH, evidence_table

ROOT = Path(__file__).resolve().parents[2]


def row(task, method, score, larger=True, baseline=False):
    return Row(
        task=task, metric="m", larger_is_better=larger, method=method, baseline=baseline, rate=None, score=score,
        spread=None, seeds=1, source="x.csv",
    )  # fmt: skip


MADE = [
    row("tweets", "best head", 70.0, baseline=True), row("tweets", "dense r=32", 74.0),
    row("tweets", "sparse r=8", 72.0),
    row("language", "untuned", 20.0, False, True), row("language", "dense r=32", 15.0, False),
    row("language", "full fine-tuning", 10.0, False), row("language", "sparse r=8", 22.0, False),
    row("hard", "untuned", 0.5, baseline=True), row("hard", "dense r=32", 0.4),
    row("alone", "dense r=32", 0.4), row("alone", "dense r=8", 0.9),
]  # fmt: skip


def test_gains_are_shares_of_the_best_one_of_each_task():
    assert gains("dense r=32", MADE) == pytest.approx((1, 0.5))  # where nobody gained nothing is told
    assert gains("sparse r=8", MADE) == pytest.approx((0.5, -0.2))
    assert gains("full fine-tuning", MADE) == (1,)
    assert gains("dense r=8", MADE) == gains("dense r=128", MADE) == gains("dense r=32", ()) == ()


def test_a_method_that_diverged_has_gained_nothing_there():
    rows = [*MADE, row("tweets", "sign r=8", None), row("language", "sign r=8", 10.0, False)]
    assert gains("sign r=8", rows) == pytest.approx((0, 1))
    assert gains("dense r=32", rows) == gains("dense r=32", MADE)
    assert gains("sign r=8", [row("new", "untuned", None, baseline=True), row("new", "sign r=8", 1.0)]) == ()
    assert [r.method for r in about(["sign r=8"], rows)][:3] == ["best head", "dense r=32", "sign r=8"]


def test_rows_about_methods_come_with_the_baseline_and_the_best():
    found = about(["sparse r=8", "dense r=128"], MADE)
    assert [(r.task, r.method) for r in found] == [
        ("tweets", "best head"), ("tweets", "dense r=32"), ("tweets", "sparse r=8"),
        ("language", "untuned"), ("language", "full fine-tuning"), ("language", "sparse r=8"),
    ]  # fmt: skip  # with what a gain is counted from, and to
    assert about([], MADE) == []


@pytest.fixture
def bench_evidence():
    sys.path.append(str(ROOT))
    for package in ("matplotlib", "tqdm"):
        pytest.importorskip(package)
    return pytest.importorskip("bench.quality.evidence")


COLUMNS = {"setting": "", "steps": "9", "device": "cpu", "precision": "float32", "mode": "full", "fingerprint": "f",
           "metric": "accuracy", "larger_is_better": "True", "kept_metric": "k", "larger_kept_is_better": "True",
           "untuned": "best head", "validation_loss": "", "kept": "", "trained": "", "ms_per_step": "",
           "peak_bytes": "", "failed": "", "gpu": "", "cpu": "c", "cpu_capability": "avx2",
           "date": "2026-11-27 14:00"}  # fmt: skip


def measured(folder, **changes):
    def of(method, phase, rate, seed, score):
        told = {"task": "tweets", "method": method, "phase": phase, "rate": rate, "seed": seed, "score": score}
        return told | COLUMNS | changes

    rows = [
        of("best head", "test", "", 0, "0.72"), of("dense r=32", "pick", "0.001", 0, ""),
        of("dense r=32", "test", "0.001", 1, "0.7612345"), of("dense r=32", "test", "0.001", 2, "0.7512345"),
        of("dense r=8", "pick", "0.001", 0, ""),
    ]  # fmt: skip
    path = folder / "quality.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_rows_are_made_of_the_test_results_of_a_file(bench_evidence, tmp_path, monkeypatch):
    rows = bench_evidence.rows_of([measured(tmp_path)], tmp_path)
    assert rows == [
        Row("tweets", "accuracy", True, "best head", True, None, 0.72, None, 1, "quality.csv"),
        Row("tweets", "accuracy", True, "dense r=32", False, 0.001, 0.75623, 0.0070711, 2, "quality.csv"),
    ]
    space = {}
    text = bench_evidence.text(rows).replace("from .evidence", "from randlora.suggestion.evidence")
    exec(compile(text, "rows.py", "exec"), space)
    assert space["ROWS"] == tuple(rows) and max(map(len, text.splitlines())) <= 120
    assert bench_evidence.rows_of([], tmp_path) == []
    path = measured(tmp_path)
    path.write_text(path.read_text().replace("0.7512345", "nan"))
    (_, diverged) = bench_evidence.rows_of([path], tmp_path)
    assert (diverged.score, diverged.spread, diverged.seeds) == (None, None, 2)
    exec(
        compile(bench_evidence.text([diverged]).replace("from .", "from randlora.suggestion."), "rows.py", "exec"),
        space,
    )
    assert space["ROWS"] == (diverged,) and "diverged" in evidence_table([diverged])
    other = path.rename(tmp_path / "other.csv")
    assert bench_evidence.rows_of([measured(tmp_path), other], tmp_path) == rows  # the first one's
    quick = measured(tmp_path, mode="quick")
    with pytest.raises(ValueError, match=r"quality\.csv has no test results of a full run, or of one with 3 seeds"):
        bench_evidence.rows_of([quick], tmp_path)
    monkeypatch.setattr(bench_evidence, "SEEDS", 2)
    assert bench_evidence.rows_of([quick], tmp_path) == rows


def test_tasks_that_do_not_fit_beside_each_other_are_below_each_other():
    told = [*MADE, *(dataclasses.replace(one, task=one.task * 5) for one in MADE)]
    lines = evidence_table(told).splitlines()
    assert max(map(len, lines)) <= WIDTH
    heads = [line for line in lines if line.startswith("measured on")]
    tasks = dict.fromkeys(one.task for one in told)
    assert len(heads) > 1 and [word[:-1] for head in heads for word in head.split() if word[-1] == ":"] == list(tasks)
    (alone,) = evidence_table([row("t" * 200, "untuned", 1.0)]).splitlines()[:1]  # nothing to be done
    assert len(alone) > WIDTH
    assert sum(line.startswith("measured on") for line in evidence_table(MADE).splitlines()) == 1


def test_what_is_said_to_be_measured_is_in_its_source(bench_evidence):
    """All of it, and nothing else: written by ``python -m bench.quality.evidence`` from the files as they are now."""
    sources = list(dict.fromkeys(row.source for row in ROWS))
    assert (ROOT / "randlora/suggestion/rows.py").read_text() == bench_evidence.text(
        bench_evidence.rows_of([ROOT / source for source in sources])
    )
    for each in ROWS:
        assert all(
            value is not None
            for name, value in dataclasses.asdict(each).items()
            if name not in ("rate", "score", "spread")
        )
