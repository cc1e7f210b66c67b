"""The matrix: which versions are tried together. The one list of them, for `make matrix`, the workflows and the docs.

    python tests/matrix/rows.py           what there is to choose from
    python tests/matrix/rows.py pinned    the rows whose versions stay, as a workflow's matrix; or: moving, all

Not every combination: each Python, PyTorch, minor version of PEFT and line of transformers at least once, old with old
and new with new, as people have them.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass

# What the row of PEFT's main branch installs: a requirement for pip, such as a folder.
PEFT_MAIN = os.environ.get("PEFT_MAIN") or "git+https://github.com/huggingface/peft"


@dataclass(frozen=True)
class Row:
    """One combination, under a name for `make matrix ROWS=...`. "" stands for what is newest on the day."""

    name: str
    python: str
    torch: str
    peft: str  # or "main": PEFT's main branch
    transformers: str
    torchao: str = "0.18.0"

    @property
    def moves(self) -> bool:
        return self.peft in ("", "main")

    @property
    def environment(self) -> str:
        """The folder's name. Rows that share it share the download of PyTorch and the build."""
        return f"python{self.python}-torch{self.torch or NEWEST_TORCH}"

    @property
    def requirements(self) -> dict[str, str]:
        """By package, for pip."""
        wanted = {"torch": self.torch, "peft": self.peft, "transformers": self.transformers, "torchao": self.torchao}
        found = {name: f"{name}=={version}" if version else name for name, version in wanted.items()}
        return found | {"peft": PEFT_MAIN} if self.peft == "main" else found


# PEFT up to 0.17 imports names that transformers 5 has no more, and its LoRA up to 0.18 such as torchao 0.18 has no
# more. On Python 3.10 the newest are torch 2.14 and transformers 5.20.
ROWS = (
    Row("peft-0.16", "3.10", "2.10.0", "0.16.0", "4.57.6", "0.17.0"),
    Row("peft-0.17", "3.12", "2.11.0", "0.17.1", "4.57.6", "0.17.0"),
    Row("peft-0.18", "3.13", "2.12.1", "0.18.1", "5.24.0", "0.17.0"),
    Row("peft-0.19", "3.11", "2.13.0", "0.19.1", "5.24.0"),
    Row("peft-0.20", "3.12", "2.11.0", "0.20.0", "5.24.0"),
    Row("peft-0.21", "3.11", "2.13.0", "0.21.2", "5.24.0"),
    Row("transformers-4", "3.11", "2.13.0", "0.21.2", "4.57.6"),
    Row("python-3.10", "3.10", "2.14.1", "0.21.2", "5.20.2"),
    Row("torch-2.15", "3.13", "2.15.0", "0.21.2", "5.24.0"),
    Row("newest", "3.13", "", "", "", ""),
    Row("peft-main", "3.13", "", "main", "", ""),
)
NEWEST_TORCH = max((row.torch for row in ROWS if row.torch), key=lambda version: [int(n) for n in version.split(".")])


def choose(names: list[str]) -> list[Row]:
    """The rows of these names; all of them for none."""
    known = {row.name: row for row in ROWS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"The matrix has no row {', '.join(unknown)}; it has {', '.join(known)}.")
    return [known[name] for name in names] or list(ROWS)


def for_workflow(which: str) -> list[dict[str, str]]:
    """What a job of a workflow reads as ``matrix.name`` and so on. `torch` and `peft` are what the Makefile takes."""
    wanted = {"pinned": [False], "moving": [True], "all": [False, True]}[which]
    found = []
    for row in ROWS:
        if row.moves in wanted:
            torch, *others = row.requirements.values()
            peft = " ".join([*(["--upgrade"] if row.moves else []), *others])
            found.append({"name": row.name, "python": row.python, "torch": torch, "peft": peft})
    return found


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(for_workflow(sys.argv[1])))
    else:
        for row in ROWS:
            print(f"{row.name:16}Python {row.python}, {', '.join(row.requirements.values())}")
