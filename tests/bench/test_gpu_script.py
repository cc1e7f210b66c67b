"""bench/gpu.sh: its calls run here at tiny sizes, every command of theirs parses, and nothing holds a call up."""

import importlib
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))
for package in ("peft", "transformers", "matplotlib", "tqdm", "hypothesis"):
    pytest.importorskip(package)

from bench import correct, correct_checks, gpu, gpu_steps, gpu_table, launches, measure, peak, questions, records  # noqa: E402
from bench.__main__ import LONG  # noqa: E402
from bench.gpu_steps import CALL_SECONDS, CALLS, Step  # noqa: E402


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory):
    """Folder of results, exit code and output of all calls, which run beside each other."""
    began = {}
    for call in CALLS:
        folder = tmp_path_factory.mktemp(call)
        command = [str(ROOT / "bench/gpu.sh"), call, str(folder), "--device", "cpu", "--patience", "5"]
        environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        began[call] = folder, subprocess.Popen(command, env=environment, **pipes)
    return {
        call: (folder, process.communicate(timeout=1200)[0], process.wait())
        for call, (folder, process) in began.items()
    }


@pytest.mark.parametrize("call", CALLS)
def test_every_step_runs(call, rehearsals):
    folder, printed, code = rehearsals[call]
    assert code == 0, printed
    names = [step.name for group in gpu_steps.steps(call, "cpu", folder) for step in group]
    table = (folder / f"{call}.txt").read_text()
    for name in names:
        assert f"\n{name:12} ok" in table, table
    assert len(printed.split("gpu.sh ")[-1].splitlines()) <= gpu_table.LINES
    assert sorted(path.name for path in folder.iterdir()) == [f"{call}.tar.gz", f"{call}.txt"]
    with tarfile.open(folder / f"{call}.tar.gz") as archive:
        packed = archive.getnames()
    assert {f"{call}/logs/{name}.log" for name in names} <= set(packed)
    wanted = {"correct": ("linear", "model", "generate"), "deep": ("model", "bases", "unique_base"),
              "quality": ("quality",),
              "forms": ("linear", "experts", "quantized", "export", "export-merged")}[call]  # fmt: skip
    assert all(any(path.endswith(f"/{name}.csv") for path in packed) for name in wanted)
    kernels = {"correct": ("correct", "launches"), "deep": ("correct", "kernels")}.get(call, ())
    assert all(any(path.endswith(f"/kernels/{name}.csv") for path in packed) for name in kernels)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_ends_in_its_time(call):
    groups = gpu_steps.steps(call, "cuda", Path("results"))
    expected = sum(max(step.expected for step in group) for group in groups)
    install = 15
    assert install + expected <= CALL_SECONDS[call]
    assert all(step.expected < step.limit for group in groups for step in group)
    assert CALL_SECONDS[call] + 2 * gpu.GRACE + 10 <= (450 if call == "quality" else 360)


@pytest.mark.parametrize("step", [s for call in CALLS for g in gpu_steps.steps(call, "cuda", Path("r")) for s in g],
                         ids=lambda step: step.name)  # fmt: skip
def test_commands_for_a_gpu_parse(step, monkeypatch, tmp_path):
    """At full size, as far as one gets without a GPU: options, names of models and methods, files of tests."""
    if step.command[1] == "pytest":
        assert all(Path(word).exists() for word in step.command if word.startswith("/"))
        return
    assert step.command[:2] == ("-m", "bench")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(records, "Book", lambda *_: None)
    asked = []

    def answer(book, cases, options):
        asked.extend(case for case in cases if not options.only or options.only in case.title)

    monkeypatch.setattr(questions, "answer", answer)
    question, argv = step.command[2], list(step.command[3:])
    if question in LONG:
        assert importlib.import_module(f"bench.{question}.cli").parse(argv).device == "cuda"
        return
    module = importlib.import_module(f"bench.{question}")
    if question in ("correct", "launches", "kernels"):

        class Parsed(Exception):
            pass

        parse = measure.parse

        def parse_only(*arguments, **more):
            assert parse(*arguments, **more).device == "cuda"
            raise Parsed

        monkeypatch.setattr(measure, "parse", parse_only)
        with pytest.raises(Parsed):
            module.main(argv)
    else:
        module.main(argv)
        assert asked


# ---- the runner ----


def run_steps(monkeypatch, folder, groups, seconds=60.0):
    monkeypatch.setattr(gpu, "steps", lambda *_: groups)
    monkeypatch.setattr(gpu, "GRACE", 1)
    began = time.time() - CALL_SECONDS["correct"] + seconds
    arguments = ["correct", "--results", str(folder / "out"), "--work", str(folder / "work"), "--device", "cpu"]
    code = gpu.main([*arguments, "--began", str(began)])
    return code, (folder / "out/correct.txt").read_text().splitlines()


def python(name, code, limit=30):
    return Step(name, ("-c", code), 1, limit)


def test_a_step_that_hangs_or_fails_stops_no_other(monkeypatch, tmp_path):
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"
    groups = [
        [python("stubborn", stubborn, limit=1), python("hangs", "import time; time.sleep(100)", limit=1)],
        [python("fails", "raise ValueError('what happened: an error')")],
        [python("works", "print('3 passed')")],
    ]
    began = time.time()
    code, lines = run_steps(monkeypatch, tmp_path, groups)
    assert code == 1 and time.time() - began < 30
    said = {line.split()[0]: line for line in lines[1:]}
    assert "out of time" in said["stubborn"] and "out of time" in said["hangs"]
    assert "FAILED (1)" in said["fails"] and "an error" in said["fails"]
    assert " ok " in said["works"] and "3 passed" in said["works"]


def test_nothing_begins_when_the_time_is_over(monkeypatch, tmp_path):
    _, lines = run_steps(monkeypatch, tmp_path, [[python("late", "print()")]], seconds=5)
    assert "skipped: no time was left" in lines[1]


def test_results_are_there_after_every_step(monkeypatch, tmp_path):
    look = (
        f"from pathlib import Path; print(sorted(p.name for p in Path({str(tmp_path / 'out')!r}).iterdir()), 'passed')"
    )
    _, lines = run_steps(monkeypatch, tmp_path, [[python("first", "print()")], [python("second", look)]])
    assert "['correct.tar.gz', 'correct.txt']" in lines[2]


def test_a_missing_tool_is_said(monkeypatch, tmp_path):
    step = Step("ncu", ("-c", "print()"), 1, 30, tool=("ncu", "--csv"))
    run_steps(monkeypatch, tmp_path, [[step]])
    log = (tmp_path / "work/logs/ncu.log").read_text()
    assert log.startswith("$ ncu --csv ") and "without ncu" in log


SIZES = {"large": 20_000, "small": 1}


def test_large_files_stay_out_of_the_archive(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "ARCHIVED_BYTES", 10_000)
    results = tmp_path / "work/results"
    write = (
        f"open({str(results / 'large')!r}, 'w').write('x' * 20000); open({str(results / 'small')!r}, 'w').write('x')"
    )
    run_steps(monkeypatch, tmp_path, [[python("writes", write)]])
    with tarfile.open(tmp_path / "out/correct.tar.gz") as archive:
        names = archive.getnames()
    assert "correct/results/small" in names and "correct/results/large" not in names


def test_the_table_is_cut(tmp_path):
    folder = tmp_path / "machine"
    folder.mkdir()
    rows = [f"method {i},{i + 1}.5,method 0,2,1048576," for i in range(100)]
    head = "provider,median_ms,baseline,times_faster,peak_bytes,failed"
    (folder / "model.csv").write_text("\n".join([head, *rows, "method x,,,,,out of memory"]))
    cut = gpu_table.table("head", [], tmp_path, lines=60).splitlines()
    whole = gpu_table.table("head", [], tmp_path, lines=None).splitlines()
    assert len(cut) == 60 and "more lines" in cut[-1] and len(whole) > 100
    assert any("7.5 2.00x 1M" in line for line in whole) and whole[-1].endswith("out of memory")


def test_a_case_with_another_baseline_says_so(tmp_path):
    folder = tmp_path / "machine"
    folder.mkdir()
    head = "d,provider,median_ms,baseline,times_faster"
    rows = ["64,PEFT,4,PEFT,1", "64,ours,2,PEFT,2", "96,ours,3,ours,1", "96,other,6,ours,0.5"]
    (folder / "export.csv").write_text("\n".join([head, *rows]))
    block = gpu_table.times(folder / "export.csv")
    assert "x PEFT" in block[0] and block[1].split("|")[1:] == [" 64      ", " 96 (x ours)"]
    assert block[3].split("|")[1:] == [" 2 2.00x ", " 3 1.00x    "]


def test_a_call_that_is_none(tmp_path):
    found = subprocess.run([str(ROOT / "bench/gpu.sh"), "all", str(tmp_path / "out")], capture_output=True, text=True)
    assert found.returncode == 2 and "no call is named all" in found.stderr and not (tmp_path / "out").exists()


def test_a_wide_table_goes_on_below(tmp_path):
    folder = tmp_path / "machine"
    folder.mkdir()
    cases = [
        (base, which) for base in ("none", "nf4", "int8", "int4", "x") for which in ("forward + backward", "forward")
    ]
    rows = [f"{base},{which},{name},{i}.25,frozen,1,1048576,{'no such package' * (base == 'int4')}"
            for i, (base, which) in enumerate(cases) for name in ("frozen", "randlora hadamard")]  # fmt: skip
    head = "base,pass,provider,median_ms,baseline,times_faster,peak_bytes,failed"
    (folder / "quantized.csv").write_text("\n".join([head, *rows]))
    lines = gpu_table.table("head", [], tmp_path, lines=60).splitlines()[2:]
    assert len(lines) == 6 and all(len(line) <= gpu_table.WIDTH for line in lines)
    heads = [head.strip() for i in (0, 3) for head in lines[i].split("|")[1:]]
    assert heads == [f"{base}/{'step' if which != 'forward' else which}" for base, which in cases]
    assert lines[1].startswith("frozen") and lines[4].startswith("frozen") and "no such package" in lines[1]


def test_metrics_of_ncu(tmp_path):
    names = [*gpu_table.NCU]
    csv = [
        "==PROF== something", ",".join(f'"{name}"' for name in ("ID", "Kernel Name", *names)),
        ",".join(['""', '""', *('"%"' for _ in names)]),
        ",".join(['"0"', '"void randlora::cuda::(anonymous namespace)::fill_kernel<float>(float*)"',
                  *(f'"{i}.5"' for i in range(len(names)))]),
    ]  # fmt: skip
    (tmp_path / "ncu.csv").write_text("\n".join(csv))
    (_, line) = gpu_table.ncu(tmp_path / "ncu.csv")
    assert line.split() == ["fill_kernel<float>", *(f"{i}.5" for i in range(len(names)))]


# ---- what the steps measure ----


def test_a_wrong_result_is_seen():
    problem = correct_checks.Problem("dense", 41, 24)
    true = problem.expected(1.0)
    wrong = correct_checks.Check({"op": "layer", "shape": (41, 24)}, ("y",), 1e-5, lambda: [(true[0] * 1.001, true[0])])
    nan = correct_checks.Check(
        {"op": "layer", "shape": (41, 24)}, ("y",), 1e-5, lambda: [(true[0] * float("nan"), true[0])]
    )
    bits = correct_checks.Check({"op": "bases", "shape": (1,)}, ("A",), 0, lambda: [(true[0] + 1e-9, true[0])])

    def raises():
        raise RuntimeError("a device-side error")

    broken = correct_checks.Check({"op": "layer", "shape": (41, 24)}, ("y",), 1e-5, raises)
    for check in (wrong, nan, bits, broken):
        (row,) = correct.rows_of(check)
        assert row["failed"]
        assert any(line.startswith("FAILED") for line in correct.summary([row]))


def test_every_kernel_has_a_check():
    """By the ops that launch them: whoever adds an op with a CUDA kernel adds it to bench/correct_*.py."""
    text = "".join(path.read_text() for path in (ROOT / "bench").glob("correct_*.py"))
    ops = {
        line.split('"')[1] for path in (ROOT / "csrc/cuda").glob("*.cu") for line in path.read_text().splitlines()
        if "m.impl(" in line
    }  # fmt: skip
    called = {"fill_bases_": "bases.draw"}
    assert ops and all(called.get(op, f"ops.{op}(") in text for op in ops), ops


def test_every_kind_and_strategy_is_asked_about():
    """Whoever adds one adds it to the first call."""
    from randlora import planner
    from randlora.bases.definition import KINDS

    assert set(correct_checks.KINDS) == set(KINDS) == {kind for kind, _, _ in launches.CASES}
    assert {strategy for _, strategy, _ in launches.CASES} == set(planner.STRATEGIES)


def test_memory_as_a_gpu_counts_it(monkeypatch):
    """The branches for CUDA, with an allocator that counts nothing."""
    from bench import generate, shapes, training
    from bench.shapes import SHAPES, TINY

    for name in ("empty_cache", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    for name, value in (("memory_allocated", 100), ("max_memory_allocated", 350)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert peak._above_result_cuda(lambda: [torch.zeros(10)], "cpu") == 350 - 100 - 40
    shape = SHAPES[TINY]
    size = shapes.Size(1, 64, 1, 8, torch.float32)
    model = shape.build(1, 64, dtype=torch.float32)
    arguments = TINY, size, shape.setting(size, rank=8), "cpu"
    assert training._peak_cuda(model, *arguments, "randlora") == 250
    assert generate.allocated(torch.device("cuda")) == 100 and generate.allocated(torch.device("cpu")) == 0
    found, result = launches.trace(lambda: torch.ones(3) + 1, on_gpu=True)
    assert result.tolist() == [2, 2, 2] and found.launches == 0 and not found.waits
