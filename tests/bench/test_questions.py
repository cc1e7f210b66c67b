"""bench/: the loop of all questions, its records, the floors, and the layer's cases."""

import argparse
import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
for package in ("peft", "transformers", "matplotlib", "tqdm"):
    pytest.importorskip(package)

from bench import __main__ as command  # noqa: E402
from bench import floors, layer, linear, measure, methods, model, questions, records  # noqa: E402
from bench.floors import Ceilings, Work  # noqa: E402
from bench.layer import Layer, Spec  # noqa: E402
from bench.measure import Provider  # noqa: E402
from bench.questions import Case, Setup  # noqa: E402

# ---- the command line ----


@pytest.mark.parametrize("name", command.COMMANDS)
def test_every_question_says_what_it_is_and_what_it_takes(name, capsys):
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(f"bench.{name}").main(["--help"])
    assert exit.value.code == 0
    assert f"python -m bench {name}" in capsys.readouterr().out
    assert len(command.summary(name)) > 20


def test_help_lists_every_question(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--help"])
    with pytest.raises(SystemExit):
        command.main()
    out = capsys.readouterr().out
    paths = (command.ROOT / "bench").glob("*.py")
    scripts = {path.stem for path in paths if 'if __name__ == "__main__":' in path.read_text()}
    folders = (path for path in (command.ROOT / "bench").glob("*/__init__.py") if "def main(" in path.read_text())
    assert scripts | {path.parent.name for path in folders} == {*command.COMMANDS, "__main__"}
    assert all(f"  {name} " in out for name in command.COMMANDS)


def parse(folder, *argv):
    return measure.parse("test", "A test.", ["--quick", "--seconds", "9", "--results", str(folder), *argv])


def test_command_leaves_out_where_results_go(tmp_path):
    options = parse(tmp_path, "--only", "a b")
    assert options.command == "python -m bench test --quick --seconds 9 --only 'a b'"


# ---- the loop and its records ----


ROUNDS = 5


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Turns of one call, and nothing large."""
    monkeypatch.setattr(measure, "TURN_SECONDS", 0)
    monkeypatch.setattr(measure, "MAX_ROUNDS", ROUNDS)
    monkeypatch.setitem(floors.COPY_BYTES, "cpu", 1 << 12)
    monkeypatch.setitem(floors.PRODUCT_SIZES, "cpu", (8,))


class Calls:
    """A provider that returns 1, and from its `stop`-th call on is interrupted."""

    def __init__(self, stop=None, reason=KeyboardInterrupt):
        self.count, self.stop, self.reason = 0, stop, reason

    def __call__(self):
        self.count += 1
        if self.count == self.stop:
            raise self.reason
        return 1


def case(title, providers, check=lambda result: 0.0, **more):
    factories = {name: (lambda run=run: Provider(run)) for name, run in providers.items()}
    return Case(title, {"size": title}, lambda: Setup(factories, next(iter(factories)), check, **more))


def rows(folder, name="test"):
    (path,) = folder.glob(f"*/{name}.csv")
    return records.read(path)


def test_interrupted_keeps_what_was_measured(tmp_path, capsys):
    options = parse(tmp_path)
    book = records.Book("test", ("size",), options)
    third_turn = 2 + 3  # the first two calls are for the check and for the clock
    stopped = [
        case("one", {"a": Calls(), "b": Calls()}), case("two", {"a": Calls(), "b": Calls(third_turn)}),
        case("three", {"a": Calls(1)}),
    ]  # fmt: skip
    assert not questions.answer(book, stopped, options, draw=False)
    found = rows(tmp_path)
    assert [(row["size"], row["provider"]) for row in found] == [("one", "a"), ("one", "b"), ("two", "a"), ("two", "b")]
    assert [int(row["samples"]) for row in found if row["size"] == "one"] == [ROUNDS, ROUNDS]
    assert int(found[2]["samples"]) in (2, 3) and int(found[3]["samples"]) == 2
    # A full run replaces the shorter one, an interrupted one does not replace the longer one; both say so.
    assert questions.answer(book, [case("two", {"a": Calls(), "b": Calls()})], options, draw=False)
    assert not questions.answer(book, [case("two", {"a": Calls(third_turn)})], options, draw=False)
    out = capsys.readouterr().out
    assert "replaces a:" in out and "keeps a:" in out
    assert [int(row["samples"]) for row in rows(tmp_path) if row["size"] == "two"] == [ROUNDS, ROUNDS]


def test_who_runs_out_of_memory_between_the_others_is_given_up(tmp_path):
    options = parse(tmp_path)
    book = records.Book("test", ("size",), options)
    full = Calls(2 + 3, torch.OutOfMemoryError("CUDA out of memory"))
    assert questions.answer(book, [case("one", {"a": Calls(), "b": full})], options, draw=False)
    found = {row["provider"]: row for row in rows(tmp_path)}
    assert int(found["a"]["samples"]) == ROUNDS and not found["a"]["failed"]
    assert found["b"]["failed"] == "out of memory" and not found["b"]["median_ms"] and full.count == 2 + 3


def test_interrupted_while_memory_is_measured(tmp_path):
    def extra(result):
        raise KeyboardInterrupt

    options = parse(tmp_path)
    book = records.Book("test", ("size",), options)
    cases = [case("one", {"a": Calls()}, extra=extra, work=Work(1000, 1000)), case("two", {"a": Calls()})]
    assert not questions.answer(book, cases, options, draw=False)
    (row,) = rows(tmp_path)
    assert row["median_ms"] and float(row["floor_ms"]) > 0 and float(row["reached"]) > 0


def test_failures_are_results(tmp_path):
    def no_memory():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    def wrong(result):
        assert result == 1, "not one"

    options = parse(tmp_path)
    book = records.Book("test", ("size",), options)
    cases = [
        Case("none", {"size": "none"}, no_memory),
        case("one", {"a": Calls(), "b": no_memory, "c": lambda: 2}, check=wrong),
    ]
    assert questions.answer(book, cases, options, draw=False)
    found = {(row["size"], row["provider"]): row["failed"] for row in rows(tmp_path)}
    assert found == {
        ("none", records.EVERYTHING): "out of memory", ("one", "a"): "", ("one", "b"): "out of memory",
        ("one", "c"): "wrong result: not one",
    }  # fmt: skip
    assert questions.answer(book, [case("none", {"a": Calls()})], options, draw=False)
    assert [row["provider"] for row in rows(tmp_path) if row["size"] == "none"] == ["a"]


def test_rows_that_do_not_say_which_case_they_are_go(tmp_path, capsys):
    options = parse(tmp_path)
    first = records.Book("test", ("size",), options)
    questions.answer(first, [case("one", {"a": Calls()})], options, draw=False)
    second = records.Book("test", ("size", "kind"), options)
    second.put({"size": "one", "kind": "x"}, {"a": {"median_ms": "1", "samples": 3}})
    assert "drops 1 rows" in capsys.readouterr().out
    assert [row["kind"] for row in rows(tmp_path)] == ["x"]
    with pytest.raises(ValueError, match=r"lacks .*kind"):
        second.put({"size": "one"}, {"a": {}})


def test_only(tmp_path):
    options = parse(tmp_path, "--only", "tw")
    questions.answer(
        records.Book("test", ("size",), options), [case("one", {"a": Calls(1)}), case("two", {"a": Calls()})], options,
        draw=False,
    )  # fmt: skip
    assert [row["size"] for row in rows(tmp_path)] == ["two"]


# ---- floors ----


def test_floor_is_the_longer_of_the_two():
    ceilings = Ceilings(copy=1e9, product=1e10)
    assert ceilings.seconds(Work(10**10, 10**8)) == 1
    assert ceilings.seconds(Work(10**8, 10**9)) == 1
    columns = ceilings.columns(Work(10**10, 0), median=4.0)
    assert columns["floor_ms"] == "1000" and columns["reached"] == "0.25"
    assert ceilings.columns(Work(1, 1), median=float("nan"))["reached"] == ""


def test_ceilings_are_the_best_of_a_run(monkeypatch):
    monkeypatch.setattr(floors, "_best", {})
    first = floors.ceilings(torch.float32, "cpu")
    assert first.copy > 0 and first.product > 0
    second = floors.ceilings(torch.float32, "cpu")
    assert second.copy >= first.copy and second.product >= first.product


@pytest.mark.parametrize("which, forward, backward", [(layer.BOTH, 1, 1), ("forward", 1, 0), ("backward", 0, 1)])
def test_work_of_a_layer(which, forward, backward):
    d, T, r = 64, 256, 8
    case = Layer(Spec(d, T, r, which=which))
    product, both = T * d * d, forward + backward

    def multiply_adds(name):
        return case.work(name).multiply_adds

    assert multiply_adds("frozen") == both * product
    assert multiply_adds("full fine-tuning") == (both + backward) * product
    assert multiply_adds("PEFT LoRA") == both * product + (forward + 2 * backward) * 2 * T * r * d
    assert multiply_adds("PEFT DoRA") == multiply_adds("PEFT LoRA") + forward * r * d * d
    # T > d: merged, whose update is built in d^3, and whose gradient takes as much twice.
    assert multiply_adds("randlora") == (forward + 2 * backward) * (product + d**3)
    assert multiply_adds("PEFT RandLoRA") == multiply_adds("PyTorch factored") == multiply_adds("randlora")
    assert multiply_adds("randlora very_sparse") < multiply_adds("randlora")
    assert case.work("frozen").bytes == both * 4 * (2 * T * d + d * d)
    assert case.work("randlora").bytes > case.work("frozen").bytes


# ---- the layer's cases ----


def options_of(*argv):
    parser = argparse.ArgumentParser()
    linear.add_options(parser)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def test_axes_are_combined():
    assert linear.specs(options_of(), linear.CASES) == list(linear.CASES)
    found = linear.specs(options_of("--d", "64,128", "--pass", "both,forward", "--dtype", "bfloat16"), linear.CASES)
    assert [(s.d, s.which, s.dtype, s.T, s.r, s.kind) for s in found] == [
        (d, which, "bfloat16", 1024, 32, "dense") for d in (64, 128) for which in (layer.BOTH, "forward")
    ]
    over = {"d": (1, 2), "T": (3, 4)}
    assert [(s.d, s.T) for s in linear.specs(options_of("--d", "5"), (), over)] == [(5, 3), (5, 4)]


@pytest.mark.parametrize("option, text", [("d", "0"), ("d", "64,x"), ("kind", "dens"), ("pass", "backwards")])
def test_axes_are_checked(option, text):
    with pytest.raises(argparse.ArgumentTypeError, match="got"):
        linear.values(option, text)


@pytest.mark.parametrize(
    "spec",
    [
        Spec(40, 24, 8), Spec(40, 24, 7, dtype="bfloat16"), Spec(40, 24, 8, kind="sparse", which="forward"),
        Spec(40, 24, 8, kind="very_sparse", which="backward"), Spec(40, 24, 8, kind="sparse", sparsity=12.0),
    ],
    ids=str,
)  # fmt: skip
def test_every_method_computes_the_layer(spec):
    case = Layer(spec)
    for name in layer.names(spec):
        if "compiled" in name:  # that takes seconds
            continue
        provider = case.provider(name)
        assert provider.check(provider.call()) < 0.05, name
    assert case.saved["randlora"] == case.x.nbytes  # the input and nothing else
    assert case.saved["randlora"] < case.saved["PEFT RandLoRA"]


def test_bases_that_are_not_kept_leave_those_of_the_others():
    """Of both methods side by side, as one case has them, though a process has bases of one definition once."""
    case = Layer(Spec(40, 24, 8))
    kept, without = (case.make(name).model.layer for name in ("randlora", layer.NOT_KEPT))
    for one in (kept, without):
        one(case.x)
    assert kept.bases["default"].nbytes > 0 == without.bases["default"].nbytes
    sparse = Layer(Spec(40, 24, 8, kind="sparse"))
    assert layer.NOT_KEPT in layer.names(case.spec) and layer.NOT_KEPT not in layer.names(sparse.spec)
    assert sparse.kind_of(layer.NOT_KEPT) == "dense"
    assert case.work(layer.NOT_KEPT).multiply_adds == case.work("randlora").multiply_adds


@pytest.mark.parametrize("name", ["randlora", "PEFT RandLoRA", "PyTorch merged", "PEFT LoRA", "full fine-tuning"])
def test_a_wrong_layer_is_noticed(name, monkeypatch):
    case = Layer(Spec(40, 24, 8))
    made = case.make(name)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.01).add_(0.01)
    monkeypatch.setattr(case, "make", lambda name: made)
    provider = case.provider(name)
    with pytest.raises(AssertionError, match="relative errors"):
        provider.check(provider.call())


def test_peak_of_a_step():
    """Of the merged form written in PyTorch: W + dW and S2 at least, 4 MiB each, and not all that torch has loaded."""
    peak = layer.peak_bytes(Spec(1024, 16), "PyTorch merged")
    assert 8 << 20 <= peak < 64 << 20


def test_methods_of_quick_runs_do_not_compile():
    options = argparse.Namespace(quick=True, methods=None)
    found = linear.methods_of(Spec(), options)
    assert "randlora" in found and methods.FROZEN in found and not any("compiled" in name for name in found)
    options = argparse.Namespace(quick=False, methods="randlora; frozen")
    assert linear.methods_of(Spec(), options) == ["randlora", "frozen"]


@pytest.mark.parametrize("fast, dtype", [(True, "bfloat16"), (False, "float32")])
def test_dtype_where_a_cpu_has_no_16_bit_products(fast, dtype, monkeypatch):
    monkeypatch.setattr(model, "multiplies_bfloat16", lambda device: fast)
    monkeypatch.setattr(linear, "multiplies_bfloat16", lambda device: fast)
    parser = argparse.ArgumentParser()
    model.add_options(parser)
    options = parser.parse_args(["--model", "Llama-3.2-3B"], argparse.Namespace(device="cpu", quick=False))
    ((_, size, setting, title),) = model.models(options, ())
    assert dtype in title and str(size.dtype) == str(setting.dtype) == f"torch.{dtype}"
    assert len(linear.default_cases(options)) == len(linear.CASES) - (not fast)
    # Asked for, it is measured all the same.
    options.dtype = "bfloat16"
    assert next(model.models(options, ()))[1].dtype == torch.bfloat16
