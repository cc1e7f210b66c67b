"""When the products of all experts are computed at once (randlora/layers/experts_grouped.py), and when not."""

import pytest
import torch
from helpers.experts_cases import adapt, experts_of, inputs, random
from helpers.experts_grouped_cases import made, seen_calls  # noqa: F401

import randlora
from randlora.layers import experts_choice


def not_so():
    """What is computed expert by expert: how the layer is made, and what is done to it and its arguments."""
    plain = {"dtype": torch.float32}
    return {
        "another dtype": (plain | {"dtype": torch.float16}, None),
        "a strategy that was asked for": (plain | {"strategy": "materialized"}, None),
        "dropout": (plain | {"randlora_dropout": 0.5}, lambda layer: layer.train()),
        "two adapters": (plain, lambda layer: two(layer)),
        "a trained weight": (plain, lambda layer: layer.base_layer.requires_grad_(True)),
        "autocast": (plain, torch.autocast("cpu", torch.bfloat16)),
    }


def two(layer):
    layer.add_adapter("b", r=2, randlora_alpha=4)
    random(layer)
    for part in layer.adapted():
        part.set_adapter(["default", "b"])


@pytest.mark.parametrize("what", not_so())
def test_where_it_cannot_be_done(seen, what):
    settings, change = not_so()[what]
    layer, arguments = made("Mixtral", **settings), inputs(2, dtype=settings["dtype"])
    if what == "autocast":
        with change:
            layer(*arguments)
    else:
        if change is not None:
            change(layer)
        layer(*arguments)
    assert not seen


def test_sizes_that_grouped_mm_does_not_take(seen):
    layer = adapt(experts_of("Mixtral", torch.float32), r=8)  # 21 features between the products
    layer(*inputs(2, dtype=torch.float32))
    assert not seen
    layer = adapt(experts_of("Mixtral", torch.float32, even=True), r=3)  # 3 * 6 columns of B
    layer(*inputs(2, dtype=torch.float32))
    assert not seen
    layer = made("Mixtral")
    layer(*(t[:0] for t in inputs(2, dtype=torch.float32)))
    assert not seen


def cheaper(counts, hidden, out, r=32, kind=None, step=True):
    """At the sizes of a model, on a GPU."""
    sizes = experts_choice.Sizes(hidden, out, -(-min(hidden, out) // r), r, torch.bfloat16)
    return experts_choice.is_taken(counts, sizes, "cuda", kind, step, step)


def test_where_it_is_cheaper():
    for kind in (None, "signs", "bits", "seed"):
        assert cheaper([256] * 128, 2048, 1536, kind=kind), "Qwen3-30B-A3B, 4096 tokens: the host's calls decide"
        assert cheaper([1] * 8 + [0] * 120, 2048, 1536, kind=kind, step=False), "decoding"
        assert not cheaper([1] + [0] * 127, 2048, 1536, kind=kind), "one call"
    assert not cheaper([4096] * 8, 4096, 28672, kind="signs"), "Mixtral, 16384 tokens: the device's time decides"
    assert cheaper([2] * 8, 4096, 28672, kind="signs")


AT_ONCE = "all experts with so many tokens: at once"


def test_explain_tells(seen):
    part = made("Mixtral").adapted()[0]
    assert AT_ONCE in randlora.explain(part, 3)
    part.strategy = "factored"
    assert AT_ONCE not in randlora.explain(part, 3)
    dropped = made("Mixtral", randlora_dropout=0.5).eval().adapted()[0]
    assert AT_ONCE not in randlora.explain(dropped, 3)
    assert AT_ONCE in randlora.explain(dropped.train(), 3, training=False)
    layer = made("Mixtral")
    two(layer)
    assert AT_ONCE not in randlora.explain(layer.adapted()[0], 3)


def test_errors_are_those_of_calls_in_turn(seen):
    part = made("Mixtral").adapted()[0]
    x = torch.randn(6, 16)
    for bad, counts in ((torch.randn(6, 20), [6, 0, 0, 0, 0]), (x, [5, 0, 0, 0, 0])):
        with pytest.raises((ValueError, RuntimeError)) as found:
            part(bad, counts, part.weight, None)
        assert "grouped_mm" not in str(found.value) and "mat_a" not in str(found.value)
    assert not seen
