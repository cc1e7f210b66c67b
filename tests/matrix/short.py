"""The short form of the matrix, for CI: other versions of PEFT beside the environment that runs this, a minute in all.

The oldest PEFT of the matrix and the newest one that is not installed lie in folders of their own, each with the
transformers that it needs, and come first on the path. Nothing is compiled, and the environment stays as it is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from matrix.environments import FOLDER
from matrix.rows import ROWS, Row
from matrix.trials import attempt

TESTS = ["integrations/peft/test_layers.py", "integrations/peft/test_files.py"]
# What transformers 4 imports in versions that transformers 5 does not go with.
TRANSFORMERS_4 = ("huggingface_hub<1", "tokenizers<0.23")


def chosen() -> list[Row]:
    installed = metadata.version("peft")
    others = [row for row in ROWS if not row.moves and row.peft != installed]
    return list(dict.fromkeys((others[0], others[-1])))


def requirements(row: Row) -> list[str]:
    needs = [f"peft=={row.peft}"]
    if row.transformers.split(".")[0] != metadata.version("transformers").split(".")[0]:
        needs += [f"transformers=={row.transformers}", *(TRANSFORMERS_4 if row.transformers.startswith("4") else ())]
    return needs


def install(needs: list[str]) -> Path:
    """A folder with these packages alone, which is there when it is whole."""
    folder = FOLDER / "-".join(["with", *(need.replace("==", "-") for need in needs if "==" in need)])
    if not folder.is_dir():
        half = folder.with_name(f"{folder.name}.half")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--upgrade", "--target", half, *needs], check=True)
        half.rename(folder)
    return folder


def main() -> int:
    bad = []
    for row in chosen():
        needs = requirements(row)
        print(f"\n== {', '.join(needs)}", flush=True)
        folder = install(needs)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
        outcome = attempt(Path(sys.executable), TESTS, PYTHONPATH=path)
        print(f"\n== {', '.join(needs)}: {outcome}", flush=True)
        if not outcome.is_good:
            bad.append(row)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
