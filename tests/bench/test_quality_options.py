"""The options of python -m bench quality."""

import csv
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "matplotlib", "tqdm", "tokenizers", "transformers"):
    pytest.importorskip(package)

from bench.quality import cli, rates, tasks, workers  # noqa: E402
from bench.quality import methods as compared  # noqa: E402
from bench.quality.tasks import corpus, language  # noqa: E402

LISTED = compared.methods()


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def run(folder, *more, tasks="tiny", methods="full fine-tuning;dense r=32"):
    arguments = ["--tasks", tasks, "--methods", methods, "--results", str(folder), "--cache", str(folder / "cache")]
    return cli.main([*arguments, "--no-picture", *more])


def test_options(capsys, tmp_path, monkeypatch):
    def missing(name, **_):
        raise FileNotFoundError("no data on this machine")

    monkeypatch.setattr(tasks, "task", missing)
    quick = cli.parse(["--quick"])
    assert quick.tasks == list(cli.QUICK_TASKS) and set(quick.methods) == set(compared.QUICK) <= set(LISTED)
    assert (quick.tries, quick.seeds) == (2, 1) and quick.command == "python -m bench quality --quick"
    full = cli.parse(["--cache", "somewhere", "--results", "there"])
    assert full.tasks == list(tasks.NAMES) and full.methods == list(LISTED) and full.command.endswith("quality")
    assert cli.parse(["--methods", "hadamard"]).methods == [f"hadamard r={r}" for r in (32, 8, 128)]
    for wrong in (
        ["--tasks", "nothing"],
        ["--methods", "nothing"],
        ["--seeds", "-1"],
        ["--seeds", "0"],
        ["--steps", "0"],
        ["--steps", "nan"],
        ["--rate", "0"],
        ["--rate", "inf"],
        ["--precision", "int8"],
    ):
        with pytest.raises(SystemExit):
            cli.parse(wrong)
    assert run(tmp_path, "--plan", tasks="tiny,search", methods="full fine-tuning;dense r=32;dense r=8") == 0
    said = capsys.readouterr().out
    assert "tiny: 21 runs of 8 steps" in said and "search: cannot be had" in said and not list(tmp_path.glob("*/*.csv"))
    assert run(tmp_path, "--prepare", str(tmp_path / "caches")) == 0 and (tmp_path / "caches").is_dir()


def test_a_rate_that_is_given_is_tested_and_none_is_picked(tmp_path, capsys):
    assert run(tmp_path, "--rate", "2e-3", "--seeds", "2", "--no-timing") == 0
    (path,) = tmp_path.glob("*/quality.csv")
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] != "best head"]
    assert [(row["phase"], row["rate"], row["seed"]) for row in rows] == [("test", "0.002", seed) for seed in "1122"]
    assert "0.002" in capsys.readouterr().out
    assert run(tmp_path, "--rate", "2e-3", "--plan") == 0 and "tiny: 6 runs" in capsys.readouterr().out


@pytest.mark.parametrize("name", workers.PRECISIONS)
def test_products_are_of_the_precision_that_is_asked_for(name, tmp_path):
    assert run(tmp_path, "--precision", name, "--tries", "1", "--seeds", "1", "--no-timing") == 0
    assert torch.get_float32_matmul_precision() == {"float32": "highest", "tf32": "high", "bf16": "medium"}[name]
    (path,) = tmp_path.glob("*/quality.csv")
    with path.open() as file:
        assert {row["precision"] for row in csv.DictReader(file)} == {name}


def test_the_language_task_has_models_of_several_widths(monkeypatch):
    monkeypatch.setattr(corpus, "corpus", lambda **_: type("Corpus", (), {"fingerprint": "words"}))
    assert [f"language-{width}" for width in language.WIDTHS] == list(tasks.WIDTHS)
    found = [tasks.task(name, quick=quick) for name in ("language", *tasks.WIDTHS) for quick in (False, True)]
    assert [task.name for task in found] == [name for name in ("language", *tasks.WIDTHS) for _ in range(2)]
    assert [task.recipe.width for task in found[2:]] == [width for width in language.WIDTHS for _ in range(2)]
    assert found[0].recipe == language.RECIPE and found[1].recipe == language.QUICK_RECIPE
    # The quick one of width 128 is that of the task itself: the same model.
    assert len({task.fingerprint for task in found}) == len(found) - 2
    assert cli.parse(["--tasks", "language-256,tiny"]).tasks == ["language-256", "tiny"]
    with pytest.raises(ValueError, match="language-1024"):
        tasks.task("language-100")


def test_the_rates_that_were_tried_say_where_the_best_one_lies():
    def pick(method, rate, loss, setting="", phase="pick"):
        return {"phase": phase, "method": method, "rate": str(rate), "validation_loss": str(loss), "setting": setting}

    def parabola(method, best):  # on a grid of factors of four
        return [pick(method, rate, (math.log2(rate / best)) ** 2 + 1) for rate in (2.5e-4, 1e-3, 4e-3)]

    rows = [
        *parabola("dense r=8", 8e-4), *parabola("hadamard r=8", 1.25e-3), *parabola("PEFT LoRA r=8", 1e-3),
        *(pick("dense r=32", rate, loss) for rate, loss in ((2.5e-4, 1), (1e-3, 2), (4e-3, math.nan))),
        pick("sparse r=8", 1e-3, 3), pick("full fine-tuning", 1e-3, "", phase="test"),
        pick("PEFT LoRA r=8", 1e-3, 9, setting="another"), pick("PEFT LoRA r=8", 2e-3, 8, setting="another"),
    ]  # fmt: skip
    found = rates.curves(rows)
    assert list(found) == ["PEFT LoRA r=8", "dense r=32", "dense r=8", "hadamard r=8"]
    assert found["dense r=8"].best == pytest.approx(8e-4) and found["PEFT LoRA r=8"].losses == {1e-3: 9.0, 2e-3: 8.0}
    said = rates.page(rows)
    assert "One rate for 2 of randlora's 3: 1.0e-03, at worst 1.25 times off the best." in said
    assert "| dense r=32 | 1.000 | 2.000 | inf |  |" in said and said.count("| validation loss |") == 2
    assert rates.page(rows[-2:-1]) == ""
