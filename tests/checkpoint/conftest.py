"""Processes that save adapters for ever, to be killed or read from meanwhile."""

import os
import subprocess
import sys

import pytest
from helpers.savers import SAVER, kill


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
