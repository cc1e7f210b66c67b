"""python -m bench quality: what is run, what is picked, what is kept when something fails or stops."""

import csv
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from torch import nn  # noqa: E402

from bench import gpu_table, methods, report  # noqa: E402
from bench.quality import cli, pictures, plan, records, summary, tasks, timing, training, workers  # noqa: E402
from bench.quality import methods as compared  # noqa: E402
from bench.quality.tiny import TinyTask  # noqa: E402

FEW = "full fine-tuning;PEFT LoRA r=8;dense r=32"
LISTED = compared.methods()


class Other(TinyTask):
    """Perplexity-like: less is better."""

    name, metric, larger_is_better, untuned, head = "docstrings", "loss", False, "untuned", []

    def score(self, model, split):
        return self._loss(model, split)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch):
    def load(name, **_):
        if name == "docstrings":
            return Other()
        raise ValueError("no data on this machine")

    monkeypatch.setattr(tasks, "task", load)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def run(folder, *more, tasks="tiny", methods=FEW):
    arguments = ["--tasks", tasks, "--methods", methods, "--results", str(folder), "--cache", str(folder / "cache")]
    return cli.main([*arguments, "--no-picture", *more])


def rows_of(folder):
    (path,) = folder.glob("*/quality.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


# ---- methods ----


@pytest.mark.parametrize("name", LISTED)
def test_every_method_adapts_all_linear_layers_but_the_head_and_trains_the_head(name):
    """From the same start; rates of the rest follow the one under trial."""
    task, method = TinyTask(), LISTED[name]
    assert len(method.rates) == compared.TRIES and list(method.rates) == sorted(method.rates)
    model, groups = training.build(task, method, 1, "cpu")
    loss = task.validation_loss(model.eval())
    assert loss == pytest.approx(task.validation_loss(task.model("cpu")), rel=1e-6)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = training.Trainer(task, model, groups, 3e-3, 8, "cpu")
    *rest, head = trainer.optimizer.param_groups
    assert all(group["initial_lr"] == 3e-3 for group in rest) and head["initial_lr"] == compared.HEAD_RATE
    assert sum(p.numel() for p in head["params"]) == 33
    assert sorted(map(id, trainer.trained)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    for batch in training.batches(task, 1, 8):
        trainer.step(batch)
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0}
    moved = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
    assert moved == set(before)
    assert all(any(part in n for n in moved) for part in ("first", "second", "head"))


def test_without_a_head_the_rest_has_one_rate_and_a_tied_output_is_left_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.inside, self.out = nn.Linear(4, 4), nn.Linear(4, 9)

        def get_output_embeddings(self):
            return self.out

    assert compared.targets(Tied(), []) == ["inside"]
    with pytest.raises(ValueError, match="no linear layer"):
        compared.targets(nn.Sequential(nn.Linear(2, 2)), ["0"])


def test_the_middle_rates_are_tried_first():
    assert [compared.tried((1, 2, 3, 4), n) for n in (1, 2, 3, 4)] == [(2,), (2, 3), (1, 2, 3), (1, 2, 3, 4)]
    assert plan.best_rate({1e-3: float("nan"), 2e-3: 0.5, 3e-3: float("inf")}) == 2e-3
    assert plan.best_rate({1e-3: float("nan")}) is None
    assert [plan.at_edge(rate, [1, 2, 3]) for rate in (1, 2, 3)] == ["lowest tried", "", "highest tried"]


def test_batches_beyond_the_tasks_own_number_come_in_another_order():
    found = [batch["x"][0, 0].item() for batch in training.batches(TinyTask(), 1, 19)]
    assert len(found) == 19 and found[:8] != found[8:16]
    assert training.moved(({"a": torch.ones(1)}, "b"), "meta")[0]["a"].is_meta


# ---- a run ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two tasks, one of which cannot be had beside a third; no timing of memory."""
    folder = tmp_path_factory.mktemp("results")
    patch = pytest.MonkeyPatch()
    patch.setattr(tasks, "task", lambda name, **_: {"docstrings": Other}[name]())
    patch.setattr(timing.peak, "in_a_process", lambda *_: 12345)
    patch.setattr(torch, "set_num_threads", lambda _: None)
    code = run(folder, tasks="docstrings,tiny,search", methods=FEW)
    patch.undo()
    return folder, code


def test_rates_are_picked_on_validation_data_and_tested_with_other_seeds(whole):
    folder, code = whole
    assert code == 1  # search cannot be had
    rows = rows_of(folder)
    assert len({records.key_of(row) for row in rows}) == len(rows) == 2 * (1 + 3 * (4 + 3 + 1))
    for task in ("docstrings", "tiny"):
        for name in FEW.split(";"):
            mine = [row for row in rows if (row["task"], row["method"]) == (task, name)]
            picks = {row["rate"]: float(row["validation_loss"]) for row in mine if row["phase"] == "pick"}
            tests = [row for row in mine if row["phase"] == "test"]
            assert {row["rate"] for row in tests} == {min(picks, key=picks.get)}
            assert [row["seed"] for row in tests] == ["1", "2", "3"] and "0" not in {row["seed"] for row in tests}
            assert all(row["score"] and row["kept"] and not row["failed"] for row in tests)
            (timed,) = (row for row in mine if row["phase"] == "timing")
            assert float(timed["ms_per_step"]) > 0 and timed["peak_bytes"] == "12345"
            assert len({row["trained"] for row in mine}) == 1
    # Breadth first: all learning rates of a task, all of its first seeds ...
    order = [(row["task"], row["phase"], row["seed"]) for row in rows if row["phase"] != "timing"]
    assert order == sorted(order, key=lambda one: (one[0], one[1] == "test" and one[2] != "", one[2]))


def test_tables_and_pictures_show_it(whole):
    folder, _ = whole
    (path,) = folder.glob("*/quality.csv")
    found = {task: summary.summary(rows) for task, rows in records.load(path).items()}
    assert list(found) == ["docstrings", "tiny"]
    tiny = found["tiny"]
    assert tiny.baseline.method == "best head" and [line.method for line in tiny.lines] == FEW.split(";")
    text = summary.text(tiny)
    assert "± " in text and "accuracy: more is better" in text and "highest tried" in text
    assert "loss: less is better" in summary.text(found["docstrings"]) and "untuned" in summary.text(
        found["docstrings"]
    )
    line = tiny.lines[0]
    assert tiny.forgotten(line) == pytest.approx(sum(line.kept) / 3 - tiny.baseline.kept[0])
    page = report.write(folder).read_text()
    assert "| PEFT LoRA r=8 |" in page and "quality-tiny.png" in page
    assert {p.name for p in path.parent.glob("*.png")} == {"quality-docstrings.png", "quality-tiny.png"}
    assert any("dense r=32" in line for line in gpu_table.table("head", [], folder, None).splitlines())


def test_a_score_that_is_no_number_is_told_and_not_drawn(whole, tmp_path, monkeypatch):
    folder, _ = whole
    rows = records.load(next(folder.glob("*/quality.csv")))["tiny"]
    changed = [dict(row) for row in rows]
    mine = [row for row in changed if row["method"] == "PEFT LoRA r=8" and row["phase"] == "test"]
    mine[1]["score"], mine[2]["kept"] = "nan", "inf"
    found = summary.summary(changed)
    assert "diverged with 1 of 3 seeds" in summary.text(found)
    drawn = []
    monkeypatch.setattr(pictures, "_panel", lambda *arguments: drawn.append(arguments[3]))
    pictures.picture(tmp_path / "x.png", found, LISTED)
    assert [[line.method for *_, line in points] for points in drawn] == 3 * [["full fine-tuning", "dense r=32"]]


def test_of_two_rates_that_were_tested_the_one_that_validation_data_prefer_is_shown(whole):
    """Fewer tries than before pick another one: its tests are later in the file."""
    folder, _ = whole
    rows = [r for r in records.load(next(folder.glob("*/quality.csv")))["tiny"] if r["method"] == "dense r=32"]
    best = next(row["rate"] for row in rows if row["phase"] == "test")
    other = next(row["rate"] for row in rows if row["phase"] == "pick" and row["rate"] != best)
    more = [row | {"rate": other, "score": "0.9"} for row in rows if row["phase"] == "test"]
    line = summary._line("dense r=32", rows + more)
    (aside,) = line.others
    assert line.rate == best and (aside.rate, aside.scores, aside.trained) == (other, [0.9] * 3, line.trained)
    assert f"at {other}: 0.9 ± 0, kept" in summary._cells(line)[-1]
    assert summary._line("dense r=32", more).rate == other


def test_machines_of_scores_and_of_times_are_told_apart(whole):
    """Scores may come from another machine, by its file; times are of one."""
    folder, _ = whole
    rows = records.load(next(folder.glob("*/quality.csv")))["tiny"]
    here = f"{rows[0]['cpu']} ({rows[0]['cpu_capability']})"
    assert summary.summary(rows).machine == here
    moved = [row if row["phase"] == "timing" else row | {"cpu": "Another"} for row in rows]
    assert summary.summary(moved).machine == f"{here}; scores also of Another ({rows[0]['cpu_capability']})"
    tests = [row for row in moved if row["phase"] != "timing"]
    assert summary.summary(tests).machine == f"Another ({rows[0]['cpu_capability']})"


def points(*numbers):
    return [(x, y, None) for x, y in numbers]


def test_the_front_is_what_nothing_beats_in_both():
    found = points((2, 5), (1, 3), (3, 4), (1, 2), (4, 6))
    assert pictures.pareto(found, larger_is_better=True) == points((1, 3), (2, 5), (4, 6))
    assert pictures.pareto(found, larger_is_better=False) == points((1, 2))


def test_what_is_there_is_not_run_again(whole, monkeypatch, capsys):
    folder, _ = whole
    before = rows_of(folder)
    monkeypatch.setattr(training, "run", lambda *_: pytest.fail("it was there"))
    monkeypatch.setattr(timing, "task", lambda *_: pytest.fail("it was there"))
    assert run(folder, tasks="docstrings,tiny") == 0
    assert rows_of(folder) == before and "PEFT LoRA r=8" in capsys.readouterr().out


def test_other_data_or_another_setting_is_run_again(whole, monkeypatch, tmp_path):
    folder, _ = whole
    (tmp_path / "machine").mkdir()
    (path,) = folder.glob("*/quality.csv")
    target = tmp_path / path.parent.name
    target.mkdir()
    (target / path.name).write_text(path.read_text())
    monkeypatch.setattr(TinyTask, "fingerprint", "other data")
    assert run(tmp_path, "--no-timing", "--tries", "1", "--seeds", "1", methods="dense r=32") == 0
    rows = rows_of(tmp_path)
    assert [row["fingerprint"] for row in rows[-3:]] == ["other data"] * 3
    assert {row["fingerprint"] for row in records.load(target / path.name)["tiny"]} == {"other data"}


# ---- what goes wrong ----


def test_a_method_that_fails_stops_no_other_and_is_tried_again(tmp_path, monkeypatch, capsys):
    def build(*_):
        raise RuntimeError("no such layer")

    broken = compared.Method("dense r=32", build, LISTED["dense r=32"].rates, LISTED["dense r=32"].setting)
    patched = {**LISTED, "dense r=32": broken}
    for module in (cli, workers):
        monkeypatch.setattr(module, "methods", lambda: patched)
    assert run(tmp_path, "--no-timing", "--tries", "2", "--seeds", "1") == 1
    failed = [row for row in rows_of(tmp_path) if row["failed"]]
    assert {row["method"] for row in failed} == {"dense r=32"} and len(failed) == 2
    assert all(row["failed"] == "RuntimeError: no such layer" for row in failed)
    assert "no such layer" in capsys.readouterr().out
    for module in (cli, workers):
        monkeypatch.setattr(module, "methods", lambda: LISTED)
    assert run(tmp_path, "--no-timing", "--tries", "2", "--seeds", "1") == 0
    assert not any(row["failed"] for row in rows_of(tmp_path)) and len(rows_of(tmp_path)) == 1 + 3 * 3


def test_ctrl_c_keeps_what_there_is_and_the_next_run_goes_on(tmp_path, monkeypatch, capsys):
    real, calls = training.run, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(training, "run", interrupted)
    assert run(tmp_path, "--no-timing", "--tries", "2", "--seeds", "1") == 130
    assert "stopped" in capsys.readouterr().out and len(rows_of(tmp_path)) == 3
    assert run(tmp_path, "--no-timing", "--tries", "2", "--seeds", "1") == 0
    assert len(rows_of(tmp_path)) == 1 + 3 * 3 and len(calls) == 4 + 7
    assert not list(tmp_path.glob("*/*.part"))


def test_nothing_begins_after_the_limit(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(cli.time, "time", lambda: now[0])
    real = training.run

    def slow(*arguments):
        now[0] += 10
        return real(*arguments)

    monkeypatch.setattr(training, "run", slow)
    monkeypatch.setattr(timing, "task", lambda task, chosen, _: {name: {"ms_per_step": "1"} for name in chosen})
    assert run(tmp_path, "--seconds-limit", "40") == 0
    rows = rows_of(tmp_path)  # 30 seconds for the runs, the rest for the timing
    assert [row["phase"] for row in rows].count("timing") == 3 and len(rows) == 4 + 3


def test_a_rate_that_diverges_is_not_picked(tmp_path, monkeypatch):
    monkeypatch.setattr(TinyTask, "validation_loss", lambda self, model: float("nan"))
    assert run(tmp_path, "--no-timing", methods="dense r=32") == 0
    assert {row["phase"] for row in rows_of(tmp_path)} == {"pick", "test"}  # of the baseline
    assert sum(row["phase"] == "test" for row in rows_of(tmp_path)) == 1
    (found,) = map(summary.summary, records.load(next(tmp_path.glob("*/quality.csv"))).values())
    assert "diverged at every learning rate" in summary.text(found)


def test_a_process_that_dies_is_replaced(tmp_path, monkeypatch):
    """Two workers of which one ends without a word; the other one goes on."""

    class Fake:
        ended = 0

        def __init__(self, setup):
            self.job, self.performer = None, workers.Performer(setup)
            self.pipe, self.its = workers.multiprocessing.Pipe()
            self.process = self
            self.exitcode = -9

        def begin(self, job):
            self.job = job
            if job.phase == "pick" and job.rate == LISTED["dense r=32"].rates[1] and not Fake.ended:
                Fake.ended += 1
                self.its.close()
            else:
                self.its.send(self.performer.perform(job))

        result = workers.Worker.result

        def join(self):
            pass

        def end(self, now):
            self.pipe.close()

    monkeypatch.setattr(workers, "Worker", Fake)
    assert run(tmp_path, "--no-timing", "--jobs", "2", "--seeds", "1", methods="dense r=32") == 1
    rows = rows_of(tmp_path)
    assert [row["failed"] for row in rows if row["failed"]] == ["its process ended with exit code -9"]
    assert sum(row["phase"] == "test" and bool(row["rate"]) for row in rows) == 1 and Fake.ended == 1


def test_a_process_that_died_while_it_had_nothing_to_do_is_noticed():
    worker = workers.Worker.__new__(workers.Worker)
    worker.pipe, its = workers.multiprocessing.Pipe()
    its.close()
    worker.begin(plan.Job("tiny", plan.FACTS))
    with pytest.raises((EOFError, ConnectionResetError)):
        worker.result()


def test_rows_that_another_run_has_written_meanwhile_stay(tmp_path):
    options = cli.parse(["--tasks", "tiny", "--results", str(tmp_path)])
    first, second = records.Table(options), records.Table(options)
    facts = records.Facts.of(TinyTask())
    case = {"task": "tiny", "method": "dense r=32", "setting": "", "phase": "pick", "seed": "0", "steps": "8",
            "fingerprint": "made up"}  # fmt: skip
    for table, rate in ((first, "0.1"), (second, "0.2"), (first, "0.3")):
        table.put(case | {"rate": rate}, facts, {"validation_loss": "1"})
    assert sorted(row["rate"] for row in rows_of(tmp_path)) == ["0.1", "0.2", "0.3"]


# ---- measures ----


def test_peak_on_a_cpu_is_counted_for_every_way_to_train():
    setup = workers.Setup(False, None, "cpu", 1, "float32")
    for name in FEW.split(";"):
        lasting = 4 * sum(p.numel() for p in _trainer(name).trained)
        assert timing._peak_cpu("tiny", name, setup) >= (2 if name == compared.FULL else 3) * lasting


def _trainer(name):
    task = TinyTask()
    return training.Trainer(task, *training.build(task, LISTED[name], 0, "cpu"), 1e-3, 8, "cpu")


def test_copies_for_timing_share_the_frozen_weights():
    model = TinyTask().model("cpu").requires_grad_(False)
    for name in FEW.split(";"):
        trainer = timing._trainer(TinyTask(), model, LISTED[name], "cpu")
        shared = {p.data_ptr() for p in trainer.model.parameters()} & {p.data_ptr() for p in model.parameters()}
        assert bool(shared) == (name != compared.FULL)
        assert methods.inner(trainer.model) is not model
