"""bench/settings: the start by the rule, which rates are tried, and what is said of them."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("matplotlib", "tqdm", "transformers"):
    pytest.importorskip(package)

from torch import nn  # noqa: E402

from bench import report  # noqa: E402
from bench.quality.tasks import language, pretrain  # noqa: E402
from bench.settings import book, cli, pictures, points, selection, table  # noqa: E402
from bench.settings.points import Column, Point  # noqa: E402

RECIPE = pretrain.Recipe(width=64, layers=1, vocabulary=64)


class Words:
    """A task of the protocol: ids that follow each other, for a model of which nothing is known."""

    name, metric, head, fingerprint = "language", "perplexity", [], "words"

    def model(self, device):
        return pretrain.new_model(RECIPE).to(device)

    def batches(self, seed):
        for start in (seed, seed + 1):
            yield (torch.arange(16)[None] + 7 * torch.arange(4)[:, None] + start) % 60

    def loss(self, model, batch):
        return pretrain.next_token_loss(model, batch)

    @torch.no_grad()
    def validation_loss(self, model):
        return self.loss(model, next(self.batches(5))).item()


@pytest.fixture
def runner(monkeypatch):
    monkeypatch.setattr(language, "make", lambda **options: Words())
    return points.Runner("cpu", None, quick=True)


def test_the_rule_makes_every_layer_reach_as_far():
    """An equal gain in layers of all shapes, and the first step of Adam moves outputs by 2/pi * lr * gain of inputs."""
    import randlora

    torch.manual_seed(0)
    shapes = {"a": (96, 96), "b": (96, 384), "c": (384, 96), "d": (96, 24)}
    for kind, r, num_bases in (("dense", 8, None), ("hadamard", 32, None), ("sparse", 8, 3)):
        model = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        config = randlora.RandLoraConfig(r=r, kind=kind, num_bases=num_bases, target_modules=list(shapes))
        adapted = randlora.get_peft_model(model, config)
        scaling = points.set_start(adapted, gain=20.0, gamma=0.05)
        gammas = []
        for name, (inputs, outputs) in shapes.items():
            layer = adapted.base_model.model[name]
            (gamma,) = layer.randlora_gamma["default"].unique().tolist()
            gammas.append(gamma)
            terms = layer.randlora_lambda["default"].numel()
            assert layer.scaling["default"] == scaling
            assert scaling * gamma * terms * math.sqrt(inputs / outputs) == pytest.approx(20.0, rel=1e-5)

            moves = [first_move(layer, 1e-3) for _ in range(24)]
            if kind != "sparse":  # a few sparse terms scatter
                assert sum(moves) / len(moves) == pytest.approx(2 / math.pi * 1e-3 * 20.0, rel=0.2), (kind, name)
        assert math.prod(gammas) ** (1 / len(gammas)) == pytest.approx(0.05, rel=1e-5)


def test_the_library_starts_by_the_same_rule():
    import randlora
    from randlora.layers.initial import GAIN, GAMMA

    def model(alpha):
        layers = {"a": nn.Linear(48, 48), "b": nn.Linear(48, 96), "c": nn.Linear(96, 24)}
        config = randlora.RandLoraConfig(r=4, randlora_alpha=alpha, target_modules=list(layers))
        return randlora.get_peft_model(nn.ModuleDict(layers), config)

    own, ours = model("auto"), model(1)
    points.set_start(ours, GAIN, GAMMA)
    for name in "abc":
        layer, other = own.base_model.model[name], ours.base_model.model[name]
        assert layer.scaling["default"] == pytest.approx(other.scaling["default"], rel=1e-5)
        torch.testing.assert_close(layer.randlora_gamma["default"], other.randlora_gamma["default"], rtol=1e-5, atol=0)


def test_rows_that_another_run_has_written_meanwhile_stay(tmp_path):
    options = SimpleNamespace(command="x", device="cpu", results=tmp_path, precision="fp32", quick=True)
    first, second = book.Book(options), book.Book(options)
    column = Column("language", 64, "rule", "dense", 4)
    for one, lr in ((first, 1e-3), (second, 2e-3), (first, 3e-3)):
        one.put(Point(column, lr, 0, 2), {"loss": 1.0, "before": 2.0, "fingerprint": "words"})
    assert sorted(row["lr"] for row in book.read(first.path)) == ["0.001", "0.002", "0.003"]


def first_move(layer, lr):
    """How far Adam's first step moves a random token's output along its gradient, in units of the token."""
    x, direction = torch.randn(1, layer.in_features), torch.randn(1, layer.out_features)
    lam = layer.randlora_lambda["default"]
    before = layer(x)
    (gradient,) = torch.autograd.grad((before * direction).sum(), lam)
    with torch.no_grad():
        lam.add_(gradient.sign(), alpha=lr)
        moved = ((layer(x) - before) * direction).mean() / direction.square().mean() / x.square().mean().sqrt()
        lam.zero_()
    return moved.item()


@pytest.mark.parametrize("optimum", [-3.2, 0.9, 4.0, 5.5, 9.6])
def test_rates_close_in_on_the_best(optimum):
    known = {}
    while asked := selection.wanted(known):
        assert not set(asked) & set(known) and len(known) < 15
        known |= {k: math.nan if k > optimum + 4 else (k - optimum) ** 2 + 1.0 for k in asked}
    best = min(known, key=lambda k: known[k] if math.isfinite(known[k]) else math.inf)
    assert best == round(optimum) and {best - 1, best + 1} <= set(known)
    assert selection.exponent(selection.rate(best)) == best


def test_selections():
    for name in selection.SELECTIONS:
        assert selection.columns(name)
    gpu = selection.columns("gpu")
    assert {column.width for column in gpu} == {0, 128, 512, 1024} and {column.r for column in gpu} >= {4, 32, 128}
    assert {column.start for column in gpu} == {"PEFT", "rule", "LoRA"}
    assert {column.kind for column in gpu} == {"dense", "hadamard", "sparse", "very_sparse", "lora"}
    only = selection.columns("all", "rule r=4 256")
    assert only and all((column.start, column.r, column.width) == ("rule", 4, 256) for column in only)
    assert len({str(column) for column in selection.columns("all")}) == len(selection.columns("all"))


def curve(column, optimum, before=4.0):
    losses = {selection.rate(k): 2.0 + 0.1 * (k - optimum) ** 2 for k in range(8)}
    return table.Curve(column, losses, before)


def test_what_one_rate_costs():
    found = curve(Column("language", 128, "rule", "dense", 4), 4.3)
    assert found.best == pytest.approx(1e-4 * 2**4.3, rel=1e-6) and found.bracketed
    assert found.lost(selection.rate(4)) == 0 and found.lost(selection.rate(6)) == pytest.approx(
        (0.289 - 0.009) / 1.991
    )
    assert found.at(1.0) is None and found.at(1e-4 * 2**5.5) == pytest.approx((found.at(3.2e-3) + found.at(6.4e-3)) / 2)
    other = curve(Column("language", 512, "rule", "dense", 4), 2.3)
    rate, off = table.one_rate([found, other])
    assert (rate, off) == (pytest.approx(1e-4 * 2**3.3), pytest.approx(2.0))
    edge = table.Curve(found.column, {1e-3: 2.0, 2e-3: math.inf}, 4.0)
    assert edge.best == 1e-3 and not edge.bracketed


COLUMNS = [
    *(Column("language", 64, "rule", kind, 4, gain=20.0, gamma=0.05) for kind in ("dense", "hadamard", "very_sparse")),
    Column("language", 64, "rule", "sparse", 8, 3, 20.0, 0.2, gamma_factor=10.0),
    Column("language", 64, "PEFT", "dense", 16),
]


def test_points_train_what_they_say(runner):
    for column in COLUMNS:
        row = runner.run(Point(column, 1e-3, seed=0, steps=4))  # more than the task has batches
        assert float(row["loss"]) < float(row["before"]) and float(row["rms_update"]) > 0
        assert float(row["score"]) == pytest.approx(math.exp(float(row["loss"])), rel=1e-3)
        numbers = {4: 4 * 16 + 16 * 64, 8: 3 * 8 + 3 * 64, 16: 16 * 4 + 4 * 64}[column.r]
        assert row["trained"] == 7 * numbers
    again = runner.run(Point(column, 1e-3, seed=0, steps=4))
    assert {**again, "seconds": ""} == {**row, "seconds": ""}  # the untuned model has stayed as it was


def test_gamma_and_head_have_rates_of_their_own():
    model = points.adapted(Words().model("cpu"), ["down_proj"], COLUMNS[0], 0)
    groups = points.groups(model, ["down_proj"], 1e-2, 0.1)
    assert sorted(group["rate"] for group in groups) == [1e-3, 1e-2] and len(points.groups(model, [], 1e-2, 1.0)) == 1
    names = {id(p): name for name, p in model.named_parameters()}
    slow = next(group for group in groups if group["rate"] == 1e-3)
    assert all("gamma" in names[id(p)] or "down_proj" in names[id(p)] for p in slow["params"])


def test_lora_is_peft_s(runner):
    pytest.importorskip("peft")
    row = runner.run(Point(Column("language", 64, "LoRA", "lora", 8), 1e-3, 0, 3))
    assert float(row["loss"]) < float(row["before"]) and float(row["rms_update"]) > 0


def test_the_script_records_resumes_and_draws(runner, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(selection, "quick", lambda: iter(COLUMNS[:2]))
    monkeypatch.setitem(selection.SELECTIONS, "quick", lambda: iter(COLUMNS[:2]))
    arguments = ["--quick", "--steps", "2", "--device", "cpu", "--results", str(tmp_path), "--cache", str(tmp_path)]
    done = []
    monkeypatch.setattr(points.Runner, "run", stopping(points.Runner.run, done, after=2))
    assert cli.main(arguments) == 130
    assert "stopped; what has been measured is kept" in capsys.readouterr().out and len(done) == 2
    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert "rule G=20 g=0.05: 2 curves; one rate for all" in said and "best rate" in said

    (path,) = tmp_path.glob("*/settings.csv")
    rows = book.read(path)
    keys = [book.key_of(row) for row in rows]
    assert len(set(keys)) == len(keys) == len(done) and {book.column_of(row) for row in rows} == set(COLUMNS[:2])
    assert all(row["commit"] and row["torch"] and row["fingerprint"] for row in rows)
    assert not list(path.parent.glob("*.part*")) and (path.parent / "settings-language.png").stat().st_size > 1000
    for name, others in (("steps", "99"), ("fingerprint", "other data")):  # are not drawn together, nor taken for these
        others = [{**row, name: others, "date": "2020-01-01"} for row in rows]
        assert book.newest([*rows, *others]) == book.newest([*others, *rows]) == rows
    written = report.write(tmp_path).read_text()
    assert "settings-language.png" in written and "rule G=20 g=0.05: 2 curves; one rate for all" in written
    before = len(done)
    assert cli.main(arguments) == 0 and len(done) == before  # nothing is left to do

    with pytest.raises(SystemExit, match="no curve"):
        cli.main([*arguments, "--only", "nothing"])


def stopping(run, done, after):
    """`run`, with Ctrl-C once, when `after` points are done."""
    turns = itertools.count()

    def wrapped(self, point):
        if next(turns) == after:
            raise KeyboardInterrupt
        done.append(point)
        return run(self, point)

    return wrapped


def test_a_point_that_fails_is_said_and_tried_again(runner, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(selection.SELECTIONS, "quick", lambda: iter(COLUMNS[:1]))
    arguments = ["--quick", "--steps", "1", "--device", "cpu", "--results", str(tmp_path), "--cache", str(tmp_path)]
    whole = points.Runner.run

    def failing(self, point):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(points.Runner, "run", failing)
    assert cli.main(arguments) == 0
    assert "nothing has been measured" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/settings.csv")
    assert all(row["failed"] == "RuntimeError: no such thing" for row in book.read(path))
    monkeypatch.setattr(points.Runner, "run", whole)
    assert cli.main([*arguments, "--seconds-limit", "0"]) == 0 and book.read(path)[0]["failed"]  # no time for any
    assert cli.main(arguments) == 0
    assert not any(row["failed"] for row in book.read(path)) and pictures.draw(path)
