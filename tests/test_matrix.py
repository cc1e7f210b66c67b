"""The matrix of versions: what the workflows read is its rows, and the table in the docs is what was run."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matrix import environments, records, rows, short, trials

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def versions(monkeypatch):
    """docs/tools/versions.py, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "tools"))
    import versions

    return versions


@pytest.fixture
def record():
    row = rows.ROWS[0]
    return {
        "row": row.name, "date": "2026-01-02T03:04+00:00", "machine": "x86_64", "randlora": "0123abc",
        "python": f"{row.python}.7", "torch": f"{row.torch}+cpu", "peft": row.peft, "transformers": row.transformers,
        "torchao": row.torchao, "check_peft": True, "passed": 12, "skipped": 3, "failed": 0, "failures": [],
        "seconds": 5,
    }  # fmt: skip


# ---- rows ----


def test_rows_have_names_of_their_own_and_versions_that_go_together():
    names = [row.name for row in rows.ROWS]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.-]+", name) for name in names)
    for row in rows.ROWS:
        assert row.transformers.startswith("4") or row.peft not in ("0.16.0", "0.17.1"), row.name
        assert row.torchao == "0.17.0" or row.peft not in ("0.16.0", "0.17.1", "0.18.1"), row.name


def test_rows_are_chosen_by_name():
    assert rows.choose([]) == list(rows.ROWS)
    assert [row.name for row in rows.choose(["newest", "peft-0.16"])] == ["newest", "peft-0.16"]
    with pytest.raises(SystemExit, match=r"no row peft-0\.1; it has peft-0\.16, "):
        rows.choose(["newest", "peft-0.1"])


def test_a_workflow_reads_all_rows():
    def read(which):
        command = [sys.executable, ROOT / "tests" / "matrix" / "rows.py", which]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pinned, moving = read("pinned"), read("moving")
    assert sorted(map(str, read("all"))) == sorted(map(str, [*pinned, *moving]))
    assert [row["name"] for row in [*pinned, *moving]] == [row.name for row in rows.ROWS]
    for row in pinned:
        assert re.fullmatch(r"torch==[\d.]+", row["torch"]) and re.fullmatch(r"3\.\d+", row["python"])
        assert re.fullmatch(r"peft==[\d.]+ transformers==[\d.]+ torchao==[\d.]+", row["peft"])
    newest, main = moving
    assert newest["torch"] == "torch" and newest["peft"] == "--upgrade peft transformers torchao"
    assert main["peft"].startswith("--upgrade git+https://")


def test_peft_main_comes_from_where_one_says(monkeypatch):
    row = next(row for row in rows.ROWS if row.peft == "main")
    monkeypatch.setattr(rows, "PEFT_MAIN", "/some/folder")
    assert row.requirements["peft"] == "/some/folder"


# ---- environments ----


def test_this_python_is_found():
    version = "{}.{}".format(*sys.version_info)
    assert environments.find_python(version) == sys.executable
    with pytest.raises(environments.Impossible, match=r"no Python 3\.99, neither as python3\.99"):
        environments.find_python("3.99")


def test_what_tests_need_is_in_every_environment():
    """The Makefile's `make test` has it from pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'"([\w-]+)', re.search(r"^test = \[(.*)\]$", text, re.M)[1])
    not_of_python = {"cmake", "pytest-xdist"}
    found = [re.split(r"[<>=]", name)[0] for name in environments.PACKAGES]
    for row in rows.ROWS:
        assert set(wanted) - not_of_python <= {*found, *row.requirements}


def test_the_commit_of_a_branch_is_known(tmp_path):
    assert environments.commit_of(None) is None
    assert environments.commit_of({"url": "https://somewhere", "vcs_info": {"vcs": "git", "commit_id": "0f"}}) == "0f"
    assert environments.commit_of({"url": tmp_path.as_uri(), "dir_info": {}}) is None
    if (ROOT / ".git").exists():
        assert environments.commit_of({"url": ROOT.as_uri(), "dir_info": {}}) == environments.git("rev-parse", "HEAD")


# ---- trials ----

REPORT = """<testsuites><testsuite>
<testcase classname="tests.a" name="test_good"/>
<testcase classname="tests.a" name="test_bad"><failure/></testcase>
<testcase classname="tests.a" name="test_worse"><failure/><error/></testcase>
<testcase classname="tests.a" name="test_left_out"><skipped/></testcase>
</testsuite></testsuites>"""


def test_a_report_is_counted(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    outcome = trials.Outcome(check_peft=True)
    trials.count(report, outcome)
    assert (outcome.passed, outcome.skipped, outcome.failed) == (1, 1, 2)
    assert outcome.failures == ["a.test_bad", "a.test_worse"]
    assert not outcome.is_good and "1 passed, 2 failed, 1 skipped" in str(outcome)
    crashed = trials.Outcome(check_peft=True)
    trials.count(tmp_path / "nothing.xml", crashed)
    assert crashed.failed == 1 and not crashed.is_good
    assert trials.Outcome(check_peft=True, passed=1).is_good
    assert not trials.Outcome(check_peft=False, passed=1).is_good


def test_the_tests_of_a_row_exist():
    for test in [*trials.TESTS, *trials.LEFT_OUT]:
        path, _, name = test.partition("::")
        assert (ROOT / "tests" / path).exists(), test
        assert not name or f"def {name}(" in (ROOT / "tests" / path).read_text(), test


# ---- the short form ----


@pytest.mark.parametrize(
    ("installed", "oldest", "newest"),
    [
        ({"peft": "0.21.2", "transformers": "5.24.0"}, ["peft==0.16.0", "transformers==4.57.6"], ["peft==0.20.0"]),
        ({"peft": "0.22.0", "transformers": "4.57.6"}, ["peft==0.16.0"], ["peft==0.21.2", "transformers==5.24.0"]),
    ],
)
def test_the_short_form_takes_the_oldest_and_the_newest_other_peft(monkeypatch, installed, oldest, newest):
    monkeypatch.setattr(short.metadata, "version", installed.__getitem__)
    found = [[need for need in short.requirements(row) if "==" in need] for row in short.chosen()]
    assert found == [oldest, newest]


def test_the_short_form_installs_beside_the_environment(monkeypatch, tmp_path):
    """Without dependencies, and half an installation is not taken for a whole one."""
    commands = []

    def pip(command, check):
        target = Path(command[command.index("--target") + 1])
        target.mkdir(exist_ok=True)
        commands.append(command)
        if len(commands) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(short, "FOLDER", tmp_path)
    monkeypatch.setattr(short.subprocess, "run", pip)
    with pytest.raises(KeyboardInterrupt):
        short.install(["peft==0.16.0", "tokenizers<0.23"])
    folder = short.install(["peft==0.16.0", "tokenizers<0.23"])
    assert folder.is_dir() and short.install(["peft==0.16.0", "tokenizers<0.23"]) == folder
    assert len(commands) == 2 and all(
        {"--no-deps", "peft==0.16.0", "tokenizers<0.23"} <= set(each) for each in commands
    )


# ---- records and the table ----


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results.jsonl")


@pytest.mark.usefixtures("results")
def test_a_run_takes_the_place_of_the_last_one(record):
    other = record | {"row": rows.ROWS[1].name}
    records.add(other)
    records.add(record)
    records.add(record | {"date": "2026-01-03T03:04+00:00", "passed": 13}, record)
    assert [found["row"] for found in records.read(records.RESULTS)] == [row.name for row in rows.ROWS[:2]]
    assert records.read(records.RESULTS)[0]["passed"] == 13
    records.add(record | {"row": "gone"})
    assert len(records.read(records.RESULTS)) == 2


def test_a_record_of_other_versions_is_none_of_the_row(record):
    row = rows.ROWS[0]
    assert records.fits(record, row)
    for name in ("python", "torch", "peft", "transformers", "torchao"):
        assert not records.fits(record, replace(row, **{name: "9.99"}))
    assert records.fits(record, replace(row, torch="", peft="main", transformers="", torchao=""))


def test_the_table_shows_every_row(versions, record):
    lines = versions.table([record]).splitlines()
    assert len(lines) == 2 + len(rows.ROWS) and len({line.count("|") for line in lines}) == 1
    assert (
        f"| {record['python']} | {record['torch']} |" in lines[2]
        and "| 2026-01-02, x86_64 | agrees | 12 | 0 | 3 |" in lines[2]
    )
    assert all("not yet" in line for line in lines[3:])
    bad = versions.table([record | {"check_peft": False, "failed": 2, "peft_commit": "0123456789"}]).splitlines()[2]
    assert "| **differs** | 12 | 2 | 3 |" in bad and "commit 0123456 |" in bad


def test_the_table_in_the_docs_is_what_was_run(versions):
    text = versions.PAGE.read_text()
    assert all(text.count(mark) == 1 for mark in versions.MARKS)
    assert versions.with_table(text, versions.table(records.read())) == text, "run docs/tools/versions.py"


def test_the_records_are_whole():
    """Of rows that the matrix has, each once, with the names of what failed."""
    lines = [json.loads(line) for line in records.RESULTS.read_text().splitlines()]
    assert lines == records.read()
    for line in lines:
        assert len(line["failures"]) == line["failed"] and line["passed"] > 0, line["row"]
