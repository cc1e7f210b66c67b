"""Runs the steps of gpu.sh: each with a time limit, one failing without the others, results packed after every one.

In the folder of results: ``<call>.txt``, the table that is printed in the end, and ``<call>.tar.gz`` with all logs and
CSV files. A step that runs out of time is interrupted as by Ctrl-C, after which bench/ keeps what it has measured, and
killed a few seconds later. Started by ``bench/gpu.sh``, which sees to it that Python finds randlora.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: python bench/gpu.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import ROOT, gpu_table
from bench.gpu_steps import CALL_SECONDS, CALLS, Step, steps

GRACE = 5  # seconds from being interrupted to being killed
ARCHIVED_BYTES = 48 << 20  # before compression, which makes a quarter of it or less


@dataclass
class Outcome:
    step: Step
    said: str = "waiting"  # ok, FAILED (code), out of time, skipped: reason
    seconds: float = 0.0
    note: str = ""  # from the log

    @property
    def failed(self) -> bool:
        return self.said.startswith(("FAILED", "out of time"))


class Call:
    """One call: its folders, its time and its outcomes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.name, self.device, self.target = options.call, options.device, options.results
        self.deadline = options.began + CALL_SECONDS[self.name] * options.patience
        self.began, self.patience = options.began, options.patience
        self.work = options.work or Path(tempfile.mkdtemp())
        self.results, self.logs = self.work / "results", self.work / "logs"
        for folder in (self.results, self.logs, self.target):
            folder.mkdir(parents=True, exist_ok=True)
        self.groups = [
            [Outcome(step) for step in group]
            for group in steps(self.name, self.device, self.results)
            if not options.steps or any(step.name in options.steps for step in group)
        ]

    def run(self) -> int:
        for group in self.groups:
            self.run_together(group)
            self.write()
        print(self.table(gpu_table.LINES))
        return 1 if any(outcome.failed for group in self.groups for outcome in group) else 0

    # ---- steps ----

    def run_together(self, group: list[Outcome]) -> None:
        running = []
        for outcome in group:
            left = self.deadline - time.time()
            if left < 10:
                outcome.said = "skipped: no time was left"
            else:
                print(f"== {outcome.step.name}", flush=True)
                begin = time.time()
                limit = min(outcome.step.limit * self.patience, left)
                running.append((outcome, self.start(outcome.step), begin, begin + limit))
        while running:
            for one in running.copy():
                outcome, process, begin, end = one
                if process.poll() is None and time.time() < end:
                    continue
                code = process.poll() if process.poll() is not None else stop(process)
                outcome.seconds = time.time() - begin
                outcome.said = "out of time" if code is None else "ok" if code == 0 else f"FAILED ({code})"
                outcome.note = gpu_table.note(self.log_of(outcome.step))
                running.remove(one)
            time.sleep(0.1)

    def log_of(self, step: Step) -> Path:
        return self.logs / f"{step.name}.log"

    def start(self, step: Step) -> subprocess.Popen:
        """With the command as its log's first line. The tool is left out where it cannot be had."""
        command = [sys.executable, *step.command]
        has_tool = bool(step.tool) and self.device != "cpu" and shutil.which(step.tool[0]) is not None
        with self.log_of(step).open("w") as log:
            log.write(f"$ {shlex.join([*step.tool, *command])}\n")
            if step.tool and not has_tool:
                log.write(f"without {step.tool[0]}, which cannot be had here\n")
            log.flush()
            return subprocess.Popen(
                [*step.tool, *command] if has_tool else command,
                cwd=ROOT if step.in_checkout else self.work, env=self.environment(step), stdin=subprocess.DEVNULL,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def environment(self, step: Step) -> dict[str, str]:
        caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton", "MPLCONFIGDIR": "matplotlib"}
        here = {name: str(self.work / folder) for name, folder in caches.items()}  # one step compiles for the next
        if self.device == "cpu":
            here["TORCHDYNAMO_DISABLE"] = "1"  # tiny sizes are not worth a compiler's time
        # Models that fill the memory must not fail for pieces of it lying idle between others.
        here["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        return {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", **here, **step.environment}

    # ---- results ----

    def write(self) -> None:
        """Table and archive, each moved into place whole."""
        text = self.target / f"{self.name}.txt"
        text.with_suffix(".part").write_text(self.table() + "\n")
        text.with_suffix(".part").replace(text)
        shutil.copy(text, self.work / "table.txt")
        partial = self.target / f"{self.name}.part"
        with tarfile.open(partial, "w:gz", compresslevel=6) as archive:
            found = [path for folder in (self.logs, self.results) for path in folder.rglob("*") if path.is_file()]
            room = ARCHIVED_BYTES
            for path in sorted([self.work / "table.txt", *found], key=lambda path: path.stat().st_size):
                room -= path.stat().st_size
                if room < 0:
                    print(f"too large for the archive: {path.relative_to(self.work)}")
                    continue
                archive.add(path, f"{self.name}/{path.relative_to(self.work)}")
        partial.replace(self.target / f"{self.name}.tar.gz")

    def table(self, lines: int | None = None) -> str:
        head = f"gpu.sh {self.name}: {time.time() - self.began:.0f} s, logs in {self.name}.tar.gz"
        outcomes = [outcome for group in self.groups for outcome in group]
        return gpu_table.table(head, outcomes, self.results, lines)


def stop(process: subprocess.Popen) -> None:
    """As Ctrl-C does; for good where that does not help, and with all that it has started."""
    for sign in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("call", choices=CALLS, help="which of them")
    add("--results", type=Path, required=True, metavar="FOLDER", help="where the table and the archive go")
    add("--device", default="cuda", help="cpu: the same steps at tiny sizes, to try the script (default: cuda)")
    add("--began", type=float, default=time.time(), metavar="SECONDS", help="since 1970, when the call began")
    add("--work", type=Path, metavar="FOLDER", help="where steps write (default: a temporary folder)")
    add("--steps", type=lambda text: text.split(","), metavar="NAME,...", help="these groups alone")
    add("--patience", type=float, default=1.0, help="factor of all time limits, for a slower machine")
    return Call(parser.parse_args(argv)).run()


if __name__ == "__main__":
    raise SystemExit(main())
