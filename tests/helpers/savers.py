"""Processes that save adapters for ever, to be killed or read from meanwhile."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SAVER = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from helpers.models import adapt, net
models = {{alpha: adapt(net(), randlora_alpha=float(alpha)) for alpha in "35"}}
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    folder, alphas = line.split()
    pid = os.fork()
    if pid == 0:
        while True:
            for alpha in alphas:
                models[alpha].save_pretrained(folder)
    print(pid, flush=True)
"""


@pytest.fixture(scope="module")
def start_saving(tmp_path_factory):
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


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for _ in range(1000):
        if not alive(pid):
            return
        time.sleep(0.002)


def alive(pid):
    return os.path.exists(f"/proc/{pid}")
