"""Files that tell other programs what to do: workflows, hooks, the citation, the Makefile's help. They say the same."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matrix.rows import ROWS

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# Not of the Makefile: what setup.py reads.
ENVIRONMENT = {"RANDLORA_CUDA", "MAX_JOBS"}


def pins(text):
    """name -> "name==version" of everything that is pinned in `text`."""
    return {pin.partition("==")[0]: pin for pin in re.findall(r"[\w.-]+==[\w.*]+", text)}


def phony():
    return set(" ".join(re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.M)).split()) - {"FORCE"}


def settings():
    return set(re.findall(r"^(\w+) \?=", MAKEFILE, re.M)) | ENVIRONMENT


def jobs():
    """Every job, as (file and name, the job)."""
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text())["jobs"].items():
            yield f"{path.name} {name}", job


def commands():
    """Every `make` that a workflow, .ci/run or a hook calls, as (where, its words)."""
    places = [(name, step["run"]) for name, job in jobs() for step in job["steps"] if "run" in step]
    places.append((".ci/run", (ROOT / ".ci" / "run").read_text()))
    places += [(hook["id"], hook["entry"]) for repo in HOOKS["repos"] for hook in repo["hooks"]]
    for where, text in places:
        for command in re.findall(r"^make +(.*)$", text, re.M):
            yield where, re.sub(r'"[^"]*"', "", command.partition("2>")[0]).split()


def test_what_is_made_can_be_made():
    found = list(commands())
    assert {where for where, _ in found} >= {".ci/run", "lint.yml lint", "tests.yml tests", "wheels.yml cpu"}
    for where, words in found:
        targets = [word for word in words if "=" not in word]
        assert targets and set(targets) <= phony(), f"{where}: make {' '.join(words)}"
        assert {word.partition("=")[0] for word in words if "=" in word} <= settings(), f"{where}: {words}"


def test_every_target_is_explained():
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = {"pytest", "ctest", "help"}  # of make test, and of itself
    assert {name for name in phony() - parts if not re.search(rf"make {name}\b", done.stdout)} == set()


def test_settings_that_workflows_give_are_the_makefiles():
    for name, job in jobs():
        given = {key for key in job.get("env", {}) if not key.startswith(("PIP_", "DEBIAN_"))}
        assert given <= settings(), name


def minors(versions):
    return {int(version.split(".")[1]) for version in versions}


def test_the_matrix_has_every_version():
    pinned = [row for row in ROWS if not row.moves]
    oldest = int(re.search(r'requires-python = ">=3\.(\d+)"', PYPROJECT)[1])
    pythons = {row.python for row in pinned}
    assert pythons == {f"3.{minor}" for minor in range(oldest, 14)}
    torches = minors(row.torch for row in pinned)
    first = int(re.search(r'TORCH = "torch>=2\.(\d+)"', (ROOT / "setup.py").read_text())[1])
    default = re.search(r"^TORCH \?= torch==(\S+)$", MAKEFILE, re.M)[1]
    assert torches == set(range(first, max(torches) + 1)) and default in {row.torch for row in pinned}
    text = (ROOT / "randlora" / "integrations" / "peft" / "__init__.py").read_text()
    lowest, highest = map(int, re.search(r"TESTED = \(\(0, (\d+)\), \(0, (\d+)\)\)", text).groups())
    assert minors(row.peft for row in pinned) == set(range(lowest, highest + 1))
    assert {row.transformers.split(".")[0] for row in pinned} == {"4", "5"}
    assert {row.peft for row in ROWS if row.moves} == {"", "main"}


def test_wheels_are_made_for_every_version_of_the_matrix():
    wheels = dict(jobs())["wheels.yml cpu"]["strategy"]["matrix"]
    assert set(wheels["torch"]) == {row.torch for row in ROWS if row.torch}
    assert {python.replace("cp3", "3.") for python in wheels["python"]} == {row.python for row in ROWS}


def test_the_cuda_torch_is_one():
    cuda = re.search(r"^CUDA_TORCH \?= (\S+)$", MAKEFILE, re.M)[1]
    found = dict(jobs())
    assert found["wheels.yml cuda"]["env"]["TORCH"] == cuda
    assert found["wheels.yml cuda"]["container"] == found["cuda.yml build"]["container"]


def test_hooks_have_the_makefiles_versions():
    """And a hook for each linter: what a commit passes, `make lint` passes."""
    ours = pins("\n".join(re.findall(r"^(?:LINTERS|CHECKERS) :?= (.*)$", MAKEFILE, re.M)))
    assert set(ours) >= {"ruff", "clang-format", "pre-commit"}
    hooks = [hook for repo in HOOKS["repos"] for hook in repo["hooks"]]
    installed = pins(" ".join(pin for hook in hooks for pin in hook.get("additional_dependencies", ())))
    # A hook that needs torch runs the program that `make lint` has installed.
    from_make = {Path(hook["entry"].split()[0]).name for hook in hooks if hook["language"] == "system"}
    assert set(ours) - {"pre-commit"} <= installed.keys() | from_make
    elsewhere = {path.name: pins(path.read_text()) for path in [*WORKFLOWS, ROOT / "pyproject.toml"]}
    for where, found in {"hooks": installed, **elsewhere}.items():
        assert {name: pin for name, pin in found.items() if ours.get(name, pin) != pin} == {}, where


def test_no_job_may_write_or_hang():
    for path in WORKFLOWS:
        assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}, path.name
    assert [name for name, job in jobs() if "timeout-minutes" not in job] == []


def test_actionlint():
    program = shutil.which("actionlint")
    if program is None:
        pytest.skip("needs actionlint on PATH")
    done = subprocess.run([program, *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_citation_says_what_readme_says():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'license="{citation["license"]}"' in (ROOT / "setup.py").read_text()
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text()
    assert paper["title"] in readme
    assert all(author["family-names"] in readme for author in paper["authors"])


def test_security_names_tests_that_exist():
    named = set(re.findall(r"`([\w/]+\.py)`", (ROOT / "SECURITY.md").read_text()))
    assert len(named) >= 5 and {name for name in named if not (ROOT / "tests" / name).is_file()} == set()


def test_the_changelog_keeps_its_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.findall(r"^## (.*)$", text, re.M)
    assert versions[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\](?: - \d{4}-\d\d-\d\d)?", version) for version in versions[1:])
    for part in re.split(r"^## .*$", text, flags=re.M)[1:]:
        names = re.findall(r"^### (.*)$", part, re.M)
        order = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
        assert names == [name for name in order if name in names] and names
