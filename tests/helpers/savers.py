"""What a process that saves adapters for ever runs, and how it is ended."""

import contextlib
import os
import signal
import time
from pathlib import Path

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


def kill(pid):
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    soon = before_deadline(60)
    while alive(pid):
        soon(f"process {pid} outlives SIGKILL")
        time.sleep(0.002)


def alive(pid):
    return os.path.exists(f"/proc/{pid}")


def before_deadline(seconds):
    """A function that fails with the words it is given once `seconds` are over: for loops that wait for chance."""
    deadline = time.monotonic() + seconds

    def check(what):
        assert time.monotonic() < deadline, f"{what}, after {seconds} seconds"

    return check
