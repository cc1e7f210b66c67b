"""The virtual environment of a row, in build/matrix: made once, then kept, as is what the compiler has made.

What is installed is the package itself, as users have it, so that a build for one PyTorch does not take the place of
that for another, as in an editable installation.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from matrix.rows import Row

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "matrix"
# Beside the row's own: the extra `test` of pyproject.toml but for what builds and runs the C++ tests, the extra `peft`,
# and what builds and runs randlora, which is installed without looking for its requirements anew.
PACKAGES = [
    *("accelerate", "pytest>=8", "hypothesis", "bitsandbytes", "hqq", "trl"),
    *("setuptools>=70.1", "ninja", "safetensors", "regex", "numpy"),
]
# Whose versions are written down, where they are installed.
RECORDED = ["torch", "peft", "transformers", "accelerate", "bitsandbytes", "torchao", "trl"]
ASK = f"""
import json, platform
from importlib import metadata

def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None

url = json.loads(metadata.distribution("peft").read_text("direct_url.json") or "null")
versions = {{name: version(name) for name in {RECORDED}}}
print(json.dumps({{"python": platform.python_version(), "versions": versions, "peft_url": url}}))
"""


class Impossible(Exception):
    """Why a row cannot be run here: one sentence without the full stop."""


def find_python(version: str) -> str:
    """A Python of this minor version: this one, one on PATH, or pyenv's."""
    kept = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv", "versions")
    for path in (sys.executable, shutil.which(f"python{version}"), *sorted(kept.glob(f"{version}.*/bin/python"))):
        ask = [path or "", "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        if path and subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version:
            return str(path)
    raise Impossible(f"there is no Python {version}, neither as python{version} on PATH nor in {kept}")


def prepare(row: Row) -> Path:
    """The row's environment with the row's versions and randlora in it, as it is in the checkout now; its folder."""
    folder = FOLDER / row.environment
    python = folder / "bin" / "python"
    if not python.is_file():
        run([find_python(row.python), "-m", "venv", folder])
    if row.peft == "main":
        run([python, "-m", "pip", "uninstall", "--yes", "--quiet", "peft"])  # pip keeps a branch's older commit
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, *(["--upgrade"] if row.moves else []), *row.requirements.values(), *PACKAGES])
    # What was built with this Python for another PyTorch, and modules that are gone, would be installed.
    for old in (ROOT / "build").glob(f"lib*-{row.python.replace('.', '')}"):
        shutil.rmtree(old)
    run([*pip, "--no-deps", "--no-build-isolation", ROOT], RANDLORA_CUDA="0")
    return folder


def describe(folder: Path) -> dict:
    """What is installed there."""
    found = json.loads(subprocess.run([folder / "bin" / "python", "-c", ASK], capture_output=True, check=True).stdout)
    versions = {name: version for name, version in found["versions"].items() if version}
    commit = commit_of(found["peft_url"])
    return {"python": found["python"], **versions, **({"peft_commit": commit} if commit else {})}


def commit_of(url: dict | None) -> str | None:
    """The commit of a package that was installed from a repository or from a checkout; None for a release."""
    if url is None:
        return None
    if "vcs_info" in url:
        return url["vcs_info"]["commit_id"]
    return git("rev-parse", "HEAD", folder=re.sub("^file://", "", url["url"]))


def git(*arguments: str, folder: str | Path = ROOT) -> str | None:
    done = subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None


def run(command: list, **environ: str) -> None:
    if subprocess.run([str(word) for word in command], cwd=ROOT, env={**os.environ, **environ}).returncode:
        raise Impossible(f"this failed: {' '.join(map(str, command))}")
