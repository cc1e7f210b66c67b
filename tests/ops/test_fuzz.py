"""The op fuzzer (helpers/op_fuzz.py) in a process of its own, as what it looks for may end the process.

RANDLORA_FUZZ_SECONDS (default 60) says for how long, RANDLORA_FUZZ_SEED (default 0) with which case it begins.
"""

import os
import subprocess
import sys
from pathlib import Path

import randlora

FOLDERS = f"{Path(randlora.__file__).parents[1]}{os.pathsep}{Path(__file__).parents[1]}"


def test_no_arguments_reach_memory_that_is_not_theirs(tmp_path):
    log = tmp_path / "case.txt"
    watched = "libasan" in os.environ.get("LD_PRELOAD", "")  # reserves terabytes of addresses, and sees more than we do
    options = {
        "--seconds": os.environ.get("RANDLORA_FUZZ_SECONDS", "60"),
        "--seed": os.environ.get("RANDLORA_FUZZ_SEED", "0"),
        "--memory": "0" if watched else "8",
        "--log": str(log),
    }
    done = subprocess.run(
        [sys.executable, "-m", "helpers.op_fuzz", *(word for option in options.items() for word in option)],
        cwd=tmp_path,
        # Fresh and freed memory is full of one byte, so that what reads it does not find zeros by luck.
        env={**os.environ, "MALLOC_PERTURB_": "165", "OMP_NUM_THREADS": "2", "PYTHONPATH": FOLDERS},
        capture_output=True,
        text=True,
    )
    case = log.read_text() if log.exists() else "no case"
    assert done.returncode == 0, f"{case}\nended with {done.returncode}:\n{done.stdout}\n{done.stderr[-5000:]}"
    outcomes = {tuple(line.split()[:2]) for line in done.stdout.splitlines()[1:]}
    ops = {op for op, _ in outcomes}
    assert len(ops) == 17 and {(op, "right") for op in ops} <= outcomes, done.stdout
