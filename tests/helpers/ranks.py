"""Functions run on several gloo processes at once, which live as long as the tests of a file.

Starting a process costs seconds of imports, so they are kept: a test sends a function and its arguments, every process
calls ``function(**arguments)`` within the same process group, and the test gets what each of them returned. The
function stands in the test's own file, at top level; ``torch.distributed.get_rank()`` tells it who it is.
"""

import faulthandler
import importlib.util
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed

TIMEOUT = 120  # seconds that a test may take, on busy machines, too
FAILED, DONE = "failed", "done"


def part_of(batch):
    """This rank's part of a batch; to be called on ranks."""
    return batch.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]


def shard(model, **settings):
    """`model`, a wrapper of one with ``layers``, by FSDP2: blocks first, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in model.model.layers:
        fully_shard(block, **settings)
    return fully_shard(model, **settings)


class RankError(AssertionError):
    """What went wrong on which rank, with its traceback."""


class Ranks:
    """`size` processes in one gloo group. ``ranks(function, **arguments)`` is what each of them returned, by rank."""

    def __init__(self, size, timeout=TIMEOUT):
        self.size, self.timeout = size, timeout
        self.processes, self.pipes, self.folder = [], [], None

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        for rank in range(self.size):
            here, there = context.Pipe()
            arguments = (rank, self.size, there, os.path.join(self.folder.name, "store"), self.timeout, list(sys.path))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.pipes.append(here)

    def __call__(self, function, **arguments):
        if not self.processes:
            self.start()
        self.send(function, **arguments)
        answers = self.answers()
        failed = {rank: answer[1] for rank, answer in enumerate(answers) if answer[0] == FAILED}
        if failed:
            self.stop()  # who failed may have left the others within a collective
            raise RankError("\n".join(f"rank {rank} of {self.size}:\n{text}" for rank, text in failed.items()))
        return [answer[1] for answer in answers]

    def send(self, function, **arguments):
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((function.__code__.co_filename, function.__qualname__, arguments)))

    def answers(self):
        """``(DONE, value)`` or ``(FAILED, traceback)`` of every rank; those that were silent failed."""
        until, answers = time.monotonic() + self.timeout, [None] * self.size
        while None in answers and time.monotonic() < until:
            open_pipes = [self.pipes[rank] for rank, answer in enumerate(answers) if answer is None]
            for pipe in multiprocessing.connection.wait(open_pipes, timeout=1):
                rank = self.pipes.index(pipe)
                try:
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, OSError):
                    self.processes[rank].join(5)
                    answers[rank] = FAILED, f"ended with exit code {self.processes[rank].exitcode}"
            if any(answer and answer[0] == FAILED for answer in answers):
                until = min(until, time.monotonic() + 5)  # the others may wait for it for ever
        for rank, answer in enumerate(answers):
            if answer is None:
                if self.processes[rank].is_alive():
                    os.kill(self.processes[rank].pid, signal.SIGUSR1)  # its stack, on stderr
                    time.sleep(0.2)
                answers[rank] = FAILED, "no answer in time"
        return answers

    def stop(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        for pipe in self.pipes:
            pipe.close()
        if self.folder is not None:
            self.folder.cleanup()
        self.processes, self.pipes, self.folder = [], [], None


def _serve(rank, size, pipe, store, timeout, path):
    sys.path[:] = path
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # As torchrun sets them: accelerate and transformers read these.
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size), OMP_NUM_THREADS="1"
    )
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
    )
    modules = {}
    while True:
        try:
            filename, name, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            if filename not in modules:
                spec = importlib.util.spec_from_file_location(f"on_ranks_{len(modules)}", filename)
                modules[filename] = importlib.util.module_from_spec(spec)
                sys.modules[spec.name] = modules[filename]
                spec.loader.exec_module(modules[filename])
            torch.manual_seed(0)
            value = getattr(modules[filename], name)(**arguments)
            torch.distributed.barrier()
            answer = DONE, value
        except BaseException:
            answer = FAILED, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
