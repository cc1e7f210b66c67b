"""RandomBases as something shared: by layers, by threads, by copies, and across the contexts it is first used in."""

import copy
import gc
import pickle
import sys
import threading
import weakref

import pytest
import torch
from helpers.common import KINDS, make_base, normal, randomize

import randlora
from randlora import RandomBases
from randlora.bases.copies import by_handle
from randlora.bases.shared import shared_bases


def test_the_shared_store_lives_as_long_as_a_layer():
    layer = randlora.Linear(make_base(41, 24), r=13)
    store = weakref.ref(layer.bases["default"])
    assert shared_bases(13) is store()
    layer(normal(2, 41))
    assert store().nbytes == 4 * (13 * 24 + 41 * 2 * 13)
    del layer
    gc.collect()
    assert store() is None
    again = randlora.Linear(make_base(8, 4), r=13)
    assert again.bases["default"].max_dim == 8, "a new store starts small"


def test_threads_share_one_store():
    interval, rank = sys.getswitchinterval(), 60_000
    sys.setswitchinterval(1e-6)
    try:
        for r in range(rank, rank + 300):
            found, barrier = [], threading.Barrier(3)

            def ask(r=r, found=found, barrier=barrier):
                barrier.wait()
                found.append(shared_bases(r))

            threads = [threading.Thread(target=ask) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert len(found) == 3
            assert all(store is found[0] for store in found), "two stores of one rank: layers would not share memory"
    finally:
        sys.setswitchinterval(interval)


def test_deepcopy_is_the_same_store():
    bases = RandomBases(64, 41, 5)
    assert copy.deepcopy({"a": [bases]})["a"][0] is bases


@pytest.mark.parametrize(
    "kind, prng",
    [(kind, "philox") for kind in KINDS]
    + [(kind, prng) for kind in ("dense", "sparse", "very_sparse") for prng in ("peft", "peft-fp16")],
)
def test_a_pickle_holds_the_definition(kind, prng):
    bases = RandomBases(64, 41, 5, kind=kind, prng=prng, seed=2**64 - 2, num_bases=3, dtype=torch.bfloat16)
    if prng == "philox":
        bases.require(70, 50, 4)  # the sparsity and the group width stay those of 41
    expected = bases.tensors()
    text = pickle.dumps(bases)
    assert len(text) < 500
    again = pickle.loads(text)
    assert again is not bases and repr(again) == repr(bases) and again.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(again.tensors(), expected, strict=True))


def test_given_tensors_are_used_as_they_are():
    A, B = normal(5, 1, 41), normal(64, 9, 5)
    bases = RandomBases.from_tensors(A, B)
    assert RandomBases.from_tensors(A, B) is bases and bases.A is A and bases.B is B and bases.scale == 1
    again = pickle.loads(pickle.dumps(bases))
    assert torch.equal(again.A, A) and torch.equal(again.B, B)
    assert again.fingerprint() == bases.fingerprint() != RandomBases.from_tensors(A, 2 * B).fingerprint()


@pytest.mark.parametrize("write", ["in place", "load_state_dict"])
@pytest.mark.parametrize("ternary", [False, True])
def test_given_tensors_that_are_written_to(ternary, write):
    """A model's buffers, say, that are loaded after a first call: no cast, packed form, hash or update stays."""

    def values(seed):
        tensors = normal(5, 1, 41, seed=seed), normal(64, 9, 5, seed=seed + 1)
        return tuple(torch.where(t.abs() > 1.9, t.sign(), 0.0) for t in tensors) if ternary else tensors

    buffers = torch.nn.Module()
    for name, tensor in zip("AB", values(0), strict=True):
        buffers.register_buffer(name, tensor)
    bases = RandomBases.from_tensors(buffers.A, buffers.B)
    layer = randomize(randlora.Linear(make_base(41, 24), r=5, bases=bases)).eval()
    x = normal(3, 41)

    def results(layer):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            half = layer(x)
        with torch.no_grad(), randlora.inference_cache():
            kept = [layer(x) for _ in range(60)][-1]
        return half, kept, layer.get_delta_weight("default"), layer.bases["default"].fingerprint()

    with torch.no_grad(), randlora.inference_cache() as scope:
        before = results(layer)
        for name, tensor in zip("AB", values(2), strict=True):
            if write == "in place":
                getattr(buffers, name).copy_(tensor)
            else:
                buffers.load_state_dict({name: tensor}, strict=False)
        assert scope.nbytes > 0
        after = results(layer)
    fresh = randlora.Linear(make_base(41, 24), r=5, bases=RandomBases.from_tensors(*values(2))).eval()
    expected = results(randomize(fresh))
    for a, b, c in zip(after, expected, before, strict=True):
        if isinstance(a, str):
            assert a == b != c
        else:
            torch.testing.assert_close(a, b)
            assert not torch.allclose(a, c)
    count = len(by_handle)
    for _ in range(3):
        buffers.A.add_(0)
        assert torch.equal(bases.tensors(torch.bfloat16)[0], buffers.A.bfloat16())
    assert len(by_handle) == count


# ---- contexts and threads ----


@pytest.mark.parametrize("first_use", ["no_grad", "inference_mode", "func.grad", "vmap", "jacrev", "compile"])
def test_what_is_generated_inside_a_transform_serves_everyone(first_use):
    """The store outlives the context it was first used in, so its tensors must be ordinary ones."""
    bases = RandomBases(41, 24, 5)

    def use(x):
        return bases.tensors()[0][0, 0, :3] * x

    x = torch.ones(3)
    if first_use in ("no_grad", "inference_mode"):
        with getattr(torch, first_use)():
            use(x)
    elif first_use == "func.grad":
        torch.func.grad(lambda x: use(x).sum())(x)
    elif first_use == "compile":
        torch.compile(use, fullgraph=True, backend="aot_eager")(x)
    else:
        (torch.vmap(use) if first_use == "vmap" else torch.func.jacrev(use))(x.expand(2, 3).clone())
    expected = RandomBases(41, 24, 5)
    for got, fresh in zip(bases.tensors(), expected.tensors(), strict=True):
        assert torch.equal(got, fresh)
        assert got.data_ptr() != 0 and not got.is_inference() and not got.requires_grad
        assert torch.equal(copy.deepcopy(got), fresh) and torch.equal(pickle.loads(pickle.dumps(got)), fresh)


def test_growing_while_others_read():
    """One thread adds larger layers while another computes: no reader may fail."""
    bases, failures, done = RandomBases(2, 2, 1), [], threading.Event()

    def read():
        while not done.is_set():
            try:
                bases.tensors()
            except Exception as error:
                failures.append(repr(error))
                return

    interval, readers = sys.getswitchinterval(), [threading.Thread(target=read) for _ in range(2)]
    sys.setswitchinterval(1e-6)
    try:
        for reader in readers:
            reader.start()
        for rows in range(3, 2000):
            bases.require(rows, 2, 2)
            assert bases.tensors()[1].shape[0] >= rows
            if failures:
                break
    finally:
        done.set()
        for reader in readers:
            reader.join()
        sys.setswitchinterval(interval)
    assert not failures


def test_compiled_layers_take_the_store_as_it_is_then():
    """The first call generates the bases outside of the graph; a store that has grown since is noticed."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    layer = randomize(randlora.Linear(make_base(41, 24), r=14))
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    x = normal(3, 41)
    with torch.autocast("cpu", torch.bfloat16):
        y = compiled(x)
        assert torch.equal(y, layer(x)) and y.dtype == torch.bfloat16
        larger = randlora.Linear(make_base(90, 80), r=14)
        larger(normal(3, 90))
        assert torch.equal(compiled(x), y) and torch.equal(layer(x), y)
    assert graphs and not any("fill_bases" in graph.code for graph in graphs)
