"""What is tried with the versions of a row: the self-check against PEFT, and tests of ours."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from xml.etree import ElementTree

from matrix.environments import ROOT

TESTS = [
    "integrations/peft",
    "integrations/test_transformers.py",
    "test_private_torch.py",
    "ops/test_linear.py",
    "layers/test_linear.py",
    "layers/test_merging.py",
    "layers/test_attention.py",
    "model/test_model.py",
    "model/test_adapters.py",
    "checkpoint/test_checkpoint.py",
    "checkpoint/test_peft.py",
]
# They compile again and again, for half of the time of all; other tests compile too.
LEFT_OUT = [
    "integrations/peft/test_damage.py::test_compiled_bases",
    "integrations/peft/test_ternary.py::test_compile",
]


@dataclass
class Outcome:
    check_peft: bool
    passed: int = 0
    skipped: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    seconds: int = 0

    @property
    def is_good(self) -> bool:
        return self.check_peft and self.passed > 0 and not self.failed

    def __str__(self) -> str:
        """As pytest would say it."""
        check = "the self-check passed" if self.check_peft else "the self-check FAILED"
        return f"{check}, {self.passed} passed, {self.failed} failed, {self.skipped} skipped in {self.seconds} s"

    as_dict = asdict


def attempt(python: Path, tests: list[str], **environ: str) -> Outcome:
    """Both, by this Python. Not in the checkout: the package is to be the installed one."""
    began = time.monotonic()
    settings = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), **environ}
    with tempfile.TemporaryDirectory() as folder:
        say = {"cwd": folder, "env": settings}
        check = subprocess.run([python, "-m", "randlora", "check-peft"], **say)
        report = Path(folder, "report.xml")
        files = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml", *(ROOT / "tests" / test for test in tests)]
        without = [f"--deselect=tests/{test}" for test in LEFT_OUT]
        quiet = ["-q", "--disable-warnings", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([python, "-m", "pytest", *quiet, *files, *without], **say)
        outcome = Outcome(check.returncode == 0)
        count(report, outcome)
    outcome.seconds = round(time.monotonic() - began)
    return outcome


def count(report: Path, outcome: Outcome) -> None:
    """Adds what pytest has reported; a run that ended before its report has failed."""
    cases = ElementTree.parse(report).getroot().iter("testcase") if report.is_file() else ()
    for case in cases:
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            outcome.failures.append(f"{case.get('classname', '')}.{case.get('name', '')}".removeprefix("tests."))
        elif "skipped" in kinds:
            outcome.skipped += 1
        else:
            outcome.passed += 1
    if not report.is_file():
        outcome.failures.append("pytest ended without a report")
    outcome.failed = len(outcome.failures)
