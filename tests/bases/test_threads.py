"""RandomBases while other threads use them, and after a fork in the midst of that."""

import os
import pickle
import sys
import threading

import pytest
import torch
from helpers.common import KINDS, normal, run_python

from randlora import RandomBases
from randlora.bases.copies import Copies
from randlora.bases.random_bases import _given_bases

SMALL, LARGE = (9, 7, 2), (120, 81, 21)  # max_dim, min_dim, num_bases


def make(kind="dense"):
    return RandomBases(SMALL[0], SMALL[1], 4, kind=kind, num_bases=SMALL[2], sparsity=16.0 if "very" in kind else None)


def size(bases):
    return bases.max_dim, bases.min_dim, bases.num_bases


def in_another_thread(function, patience=None):
    """Runs it to its end, or for `patience` seconds if it may have to wait for this thread; returns the thread."""
    thread = threading.Thread(target=function)
    thread.start()
    thread.join(patience)
    return thread


def at_every_instruction(check, function, *codes):
    """Calls `function`, and `check` between any two instructions of `codes`: where other threads, or forks, may be."""

    def trace(frame, event, _):
        if frame.f_code not in codes:
            return None
        frame.f_trace_opcodes = True
        check()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("kind", KINDS)
def test_copies_serve_the_size_at_any_moment(kind):
    """A layer whose size the store has says so without a lock, and takes the copies that are there."""
    bases = make(kind)
    for wanted in (SMALL, LARGE):
        seen = []

        def check(seen=seen):
            max_dim, min_dim, num_bases = size(bases)
            for A, B in [
                *bases.copies.dense.values(),
                *(t for t in vars(bases.copies.ready).values() if isinstance(t[0], torch.Tensor)),
            ]:
                assert A.shape[2] >= min_dim and B.shape[0] >= max_dim and B.shape[1] >= num_bases
            for form, _ in bases.copies.packed.values():
                if form.name == "lists":
                    assert form.tensors.b_starts.numel() == 2 * num_bases * 4 + 1
                elif kind == "hadamard":
                    a, b, c, _ = form.of(min_dim)
                    assert 32 * len(a) >= min_dim and 32 * len(b) >= max_dim and 32 * len(c) >= num_bases * 4
                else:
                    assert form.tensors.b_planes.shape[0] == num_bases * 4
            seen.append(size(bases))

        bases.tensors(), bases.pattern(1)
        growing = RandomBases.require.__code__, Copies.clear.__code__
        at_every_instruction(check, lambda wanted=wanted: bases.require(*wanted), *growing)
        check()
        assert seen[-1] == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_that_finds_its_size_gets_it(kind):
    """Another thread is in the midst of letting the store grow."""
    bases = make(kind)
    bases.tensors(), bases.pattern(7)
    found, threads = [], []

    def use():
        bases.require(*LARGE)
        A, B = bases.tensors()
        found.append((A.shape[2], *B.shape[:2]))

    def clear(drop=bases.copies.clear):
        threads.append(in_another_thread(use, patience=0.5))
        drop()

    bases.copies.clear = clear
    bases.require(*LARGE)
    (thread,) = threads
    thread.join()
    assert found == [(LARGE[1], LARGE[0], LARGE[2])]


class ReadInTheMidst(RandomBases):
    """Grows in another thread when its attribute `at` is read, if nobody forbids it."""

    at = None

    def __getattribute__(self, name):
        if name == object.__getattribute__(self, "at"):
            self.at = None
            in_another_thread(lambda: self.require(*LARGE), patience=0.5)
        return object.__getattribute__(self, name)


class GrownInTheMidst(RandomBases):
    """Runs `then` in another thread while it grows, if nobody forbids it."""

    then = thread = None

    @property
    def min_dim(self):
        return self.__dict__["min_dim"]

    @min_dim.setter
    def min_dim(self, value):
        if self.then is not None:
            then, self.then = self.then, None
            self.thread = in_another_thread(then, patience=0.5)
        self.__dict__["min_dim"] = value


USES = {
    "pickle": lambda bases: size(pickle.loads(pickle.dumps(bases))),
    "to": lambda bases: size(bases.to(torch.float64)),
    "fingerprint": lambda bases: {fingerprint(SMALL): SMALL, fingerprint(LARGE): LARGE}.get(bases.fingerprint()),
}


def fingerprint(dims):
    return RandomBases(*dims[:2], 4, num_bases=dims[2]).fingerprint()


@pytest.mark.parametrize("at", ["max_dim", "min_dim", "num_bases"])
@pytest.mark.parametrize("use", ["pickle", "fingerprint"])
def test_a_copy_has_one_size(use, at):
    """That before or after growing, but no mixture: a B of few rows with an A of many columns."""
    bases = ReadInTheMidst(SMALL[0], SMALL[1], 4, num_bases=SMALL[2])
    bases.at = at
    assert USES[use](bases) in (SMALL, LARGE)


@pytest.mark.parametrize("use", USES)
def test_a_copy_of_bases_that_grow_has_one_size(use):
    bases, found = GrownInTheMidst(SMALL[0], SMALL[1], 4, num_bases=SMALL[2]), []
    bases.then = lambda: found.append(USES[use](bases))
    bases.require(*LARGE)
    bases.thread.join()
    assert found in ([SMALL], [LARGE])


def test_bytes_are_counted_while_copies_are_made():
    bases = make()

    class Growing:
        @property
        def nbytes(self):
            bases.draw = draw
            bases.tensors(torch.bfloat16)
            return 0

    bases.tensors()
    draw, bases.draw = bases.draw, lambda *_: (Growing(), Growing())
    bases.tensors(torch.float64)
    elements = 4 * SMALL[1] + SMALL[0] * SMALL[2] * 4
    assert bases.nbytes == 4 * elements
    assert bases.nbytes == 6 * elements


def test_equal_tensors_give_one_object_to_all_threads(monkeypatch):
    A, B = normal(5, 1, 41), normal(64, 9, 5)
    found, threads, around = [], [], RandomBases.around

    def ask():
        found.append(RandomBases.from_tensors(A, B))

    def slow(*tensors):
        if not threads:
            threads.append(None)
            threads[0] = in_another_thread(ask, patience=0.5)
        return around(*tensors)

    monkeypatch.setattr(RandomBases, "around", slow)
    ask()
    threads[0].join()
    assert found[0] is found[1] is _given_bases[id(A), id(B)]


# ---- fork ----

FORK = """
import json, os, signal, sys, threading
import torch
torch.set_num_threads(1)
import randlora
from randlora import RandomBases
from randlora.bases import shared

held, go = threading.Event(), threading.Event()

def wait():
    held.set()
    go.wait()

{holder}

thread = threading.Thread(target=hold)
thread.start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(60)  # kills it if it hangs
    held.wait = go.wait = lambda: None
    go.set()
    use()
    os._exit(0)
go.set()
thread.join()
use()  # the parent's locks are as they were
print(json.dumps(os.waitpid(child, 0)[1]))
"""

HOLDERS = {
    "a copy is made": """
bases = RandomBases(64, 41, 5)
draw = bases.draw
def hold():
    bases.draw = lambda *a: (wait(), draw(*a))[1]
    bases.tensors()
def use():
    bases.draw = draw
    assert all(torch.equal(a, b) for a, b in zip(bases.tensors(), RandomBases(64, 41, 5).tensors()))
    bases.require(100, 80, 20)
    assert bases.tensors()[1].shape == (100, 20, 5)
""",
    "lists are made": """
bases = RandomBases(640, 410, 5, "very_sparse")
fill = bases.fill
def hold():
    bases.fill = lambda *a: (wait(), fill(*a))[1]
    bases.pattern(410)
def use():
    bases.fill = fill
    fresh = RandomBases(640, 410, 5, "very_sparse").pattern(410)
    assert all(torch.equal(a, b) for a, b in zip(bases.pattern(410)[0], fresh[0]))
""",
    "it grows": """
bases = RandomBases(64, 41, 5)
bases.tensors()
clear = bases.copies.clear
bases.copies.clear = lambda: (wait(), clear())
def hold():
    bases.require(100, 80, 20)
def use():
    bases.require(100, 80, 20)
    assert all(torch.equal(a, b) for a, b in zip(bases.tensors(), RandomBases(100, 80, 5, num_bases=20).tensors()))
""",
    "a shared store is made": """
def hold():
    kept.append(shared.shared(("mine",), lambda: (wait(), RandomBases(64, 41, 5))[1]))
def use():
    kept.append(shared.shared_bases(17))
    randlora.Linear(torch.nn.Linear(41, 24), r=5)(torch.ones(2, 41))
kept = []
""",
    "tensors are taken": """
tensors = torch.ones(5, 1, 41), torch.ones(64, 9, 5)
around = RandomBases.around
def hold():
    RandomBases.around = lambda *a: (wait(), around(*a))[1]
    kept.append(RandomBases.from_tensors(*tensors))
def use():
    RandomBases.around = around
    kept.append(RandomBases.from_tensors(*tensors))
kept = []
""",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_forked_child_does_not_wait_for_a_thread_that_it_lacks(holder, tmp_path):
    assert run_python(FORK.format(holder=HOLDERS[holder]), tmp_path, PYTHONWARNINGS="ignore") == 0
