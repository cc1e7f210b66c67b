"""The sdist holds what a checkout holds, and the tests of the benchmarks, which read files beside the code, pass in it.

It is built from a copy of the files that git knows, as setuptools would take stale names from an older `*.egg-info`.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import randlora
from randlora import _load

pytest.importorskip("setuptools", reason="an sdist is built by setuptools")

ROOT = Path(__file__).resolve().parents[1]
HOOK = """
import sys
sys.path.insert(0, "build_backend")
import randlora_build_backend
getattr(randlora_build_backend, sys.argv[1])(sys.argv[2])
"""
# `python -m bench report` draws these anew from the CSV files, which are there.
LEFT_OUT = re.compile(r"bench/results/.*\.(png|html)")
# They compute with every method, for longer than all the others together, and read nothing that the others do not read.
NOT_SLOW = "not test_models and not test_host and not test_gpu_script and not test_peak_of_a_step"


def tracked():
    """The files that git knows, and those that it would add."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("needs git")
    if done.returncode or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to compare with")
    return sorted(name for name in done.stdout.split("\0") if name and (ROOT / name).is_file())


def run_hook(name, target, folder):
    """A hook of the build backend, as pip calls it, on the source in `folder`."""
    environ = {**os.environ, "RANDLORA_CUDA": "0"}
    done = subprocess.run(
        [sys.executable, "-c", HOOK, name, str(target)], cwd=folder, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def requirements(path):
    lines = path.read_text().splitlines()
    return [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ")]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder that an sdist of this checkout unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    checkout = folder / "checkout"
    for name in tracked():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name)
    run_hook("build_sdist", folder, checkout)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def run_pytest(folder, *arguments):
    """pytest in `folder`, with the package of `folder` and the binary of the environment."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    for path in (Path(randlora._C.__file__), _load.BUILD_RECORD):
        shutil.copy(path, folder / "randlora")
    environ["PYTHONPATH"] = str(folder)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)
    return done, done.stdout[-3000:] + done.stderr[-3000:]


def test_it_holds_every_file(unpacked):
    missing = [name for name in tracked() if not (unpacked / name).exists() and not LEFT_OUT.fullmatch(name)]
    assert not missing, f"MANIFEST.in leaves out {missing}"


def test_it_holds_nothing_else(unpacked):
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    made = {name for name in files - set(tracked()) if not name.startswith("randlora.egg-info/")}
    ours = {f"randlora/{Path(path).name}" for path in (randlora._C.__file__, _load.BUILD_RECORD)}  # of run_pytest
    assert made - ours - {name for name in made if "__pycache__" in name} == {"PKG-INFO", "setup.cfg"}


def test_a_binary_made_of_it_fits_this_torch_only(unpacked, tmp_path):
    """The sdist itself fits every PyTorch."""
    run_hook("prepare_metadata_for_build_wheel", tmp_path, unpacked)
    (metadata,) = tmp_path.glob("*.dist-info/METADATA")
    of_source, of_binary = requirements(unpacked / "PKG-INFO"), requirements(metadata)
    assert of_source[0] == "torch>=2.10"
    assert of_binary[0] == f"torch=={'.'.join(torch.__version__.split('.')[:2])}.*"
    assert of_source[1:] == of_binary[1:] and len(of_source) > 4


def test_benchmarks_are_tested_from_it(unpacked):
    done, output = run_pytest(unpacked, "tests/bench", "-k", NOT_SLOW)
    assert done.returncode == 0 and f"randlora: {unpacked}" in done.stdout, output
    assert " passed" in output
