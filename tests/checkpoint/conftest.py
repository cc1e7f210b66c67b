"""Folders with adapters to be damaged, and processes that save for ever, to be killed or read from meanwhile."""

import os
import shutil
import subprocess
import sys

import pytest
from helpers.damaged import make_adapters
from helpers.savers import SAVER, kill


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture
def folder(folders, tmp_path):
    return shutil.copytree(folders / "ours", tmp_path / "adapter")


@pytest.fixture
def peft_folder(folders, tmp_path):
    return shutil.copytree(folders / "peft", tmp_path / "peft adapter")


@pytest.fixture(scope="module")
def start_saving():
    """``start_saving(folder, alphas)``: the id of a process that saves adapters with these alphas in turn, for ever."""
    command = [sys.executable, "-c", SAVER]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
    ) as server:
        assert server.stdout.readline() == "ready\n"

        def start(folder, alphas):
            server.stdin.write(f"{folder} {alphas}\n")
            started.append(int(server.stdout.readline()))
            return started[-1]

        yield start
        for pid in started:
            kill(pid)
        server.kill()
