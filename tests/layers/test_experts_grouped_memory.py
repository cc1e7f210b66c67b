"""What the products of all experts at once take and keep (randlora/layers/experts_grouped.py), on the CPU."""

import functools
import gc
import weakref

import pytest
import torch
from helpers.common import assert_same_bits, over
from helpers.counted import SavedBytes
from helpers.experts_cases import E, inputs, parameters_of
from helpers.experts_grouped_cases import in_turn, made, seen_calls, step  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from randlora.layers import experts_choice, offload


@over("kind", ["dense", "hadamard"])
def test_what_is_kept_for_backward(seen, kind):
    """As expert by expert: the tokens of each part. Bases that were made for the call are made again."""
    layer, arguments = made("Mixtral", kind), inputs(2, dtype=torch.float32)
    together = kept(layer, arguments)
    assert len(seen) == 2
    with in_turn():
        assert together == kept(layer, arguments)
    assert len(seen) == 2


def kept(layer, arguments):
    known = [*layer.parameters(), *arguments]
    for part in layer.adapted():
        known += part.pattern("default") or part.bases["default"].tensors(torch.float32, arguments[0].device)
    with SavedBytes(known) as saved:
        layer(*arguments)
    return saved.bytes


def test_selective_checkpointing_may_keep_the_products(seen):
    layer, arguments = made("Mixtral"), inputs(2, dtype=torch.float32)
    expected = step(layer, arguments)
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten._grouped_mm.default])

    def call(*given):
        return checkpoint(layer, *given, use_reentrant=False, context_fn=contexts)

    y = call(*arguments)
    wanted = [arguments[0], arguments[2], *parameters_of(layer)]
    for a, b in zip((y, *torch.autograd.grad(y.square().sum(), wanted)), expected, strict=True):
        assert_same_bits(a, b)


def test_a_weight_that_is_there_for_the_call_alone(seen, monkeypatch):
    """As of offloaded experts: hooks that move what autograd keeps elsewhere leave nothing of it behind."""
    layer, arguments = made("GptOss"), inputs(2, dtype=torch.float32)
    made_for_calls = []

    def read(base, name):
        fresh = getattr(base, name).detach().clone()
        made_for_calls.append(weakref.ref(fresh))
        return fresh

    monkeypatch.setattr(offload, "read", read)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t):
        y = layer(*arguments)
    assert len(seen) == 2 and len(made_for_calls) == 4
    seen.clear()  # which holds them, too
    gc.collect()
    assert not any(ref() is not None for ref in made_for_calls)
    y.sum().backward()


class Largest(TorchDispatchMode):
    """The largest result of the op that makes scaled bases."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.randlora.unique_base.default:
            self.bytes = max(self.bytes, result.nbytes)
        return result


@over("kind", ["dense", "hadamard"])
@pytest.mark.parametrize("experts", [0, 1, 2, 5])
def test_the_workspace_bounds_what_exists_at_once(seen, experts, kind):
    """Pieces of so many experts; where there is no room for one, in turn."""
    layer, arguments = made("Mixtral", kind, parameters=["down_proj"]), inputs(2, "even", torch.float32)
    (part,) = layer.adapted()
    counts = arguments[1].flatten().bincount(minlength=E).tolist()
    sizes = part._sizes("default", torch.float32)
    bases = sizes.B_bytes if kind == "hadamard" else 0
    part.workspace = bases + experts * sizes.temporaries(max(counts)) + 100
    with Largest() as largest:
        step(layer, arguments)
    assert bool(seen) == (experts > 0)
    if experts:
        of_one = sizes.n * sizes.r * sizes.m * 4
        assert of_one * experts <= largest.bytes <= of_one * (experts + 1)
        assert largest.bytes == of_one * max(map(len, experts_choice.pieces(counts, sizes, part.workspace - bases)))
