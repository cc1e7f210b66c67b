"""Plans: one string for every number of tokens, for calls that are traced before the number is known."""

import pytest
import torch
from helpers.common import FLOATS, make_layer, normal

from randlora.planner import Lists, choose, plan

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


def read(plan, T):
    for part in plan.split(","):
        name, _, limit = part.partition("<")
        if not limit or int(limit) > T:
            return name
    raise AssertionError(plan)


@given(
    st.tuples(*[st.integers(1, 5000)] * 3, st.integers(1, 64)),
    st.tuples(st.sampled_from(FLOATS), st.sampled_from((None, *FLOATS)), st.sampled_from(("cpu", "cuda"))),
    st.tuples(*[st.booleans()] * 3),
    st.one_of(
        st.sampled_from((None, "planes", "bits", "signs")),
        st.builds(Lists, st.integers(1, 5000), st.floats(0.1, 5000.0)),
    ),
)
def test_a_plan_is_the_choice_for_every_number_of_tokens(shape, types, needs, form):
    """On both sides of every limit that it names, among others."""
    needs = dict(zip(("dropout", "need_x", "need_parameters"), needs, strict=True)) | {"form": form}
    plans = plan(*shape, *types, **needs)
    limits = [int(part.partition("<")[2]) for parts in plans for part in parts.split(",") if "<" in part]
    for T in {0, 1, 2, 10**4, *(limit + step for limit in limits for step in (-1, 0, 1))} - {-1}:
        assert tuple(read(parts, T) for parts in plans) == choose(T, *shape, *types, **needs)


@pytest.mark.parametrize("plan", ["factored<3,materialized<5,merged", "merged<5,factored"])
@pytest.mark.parametrize("tokens", [0, 2, 3, 4, 5, 6])
def test_the_op_reads_plans(plan, tokens):
    layer, x = make_layer(41, 24), normal(tokens, 41)
    results = []
    for strategy in (plan, read(plan, tokens)):
        layer.strategy = strategy
        y = layer(x)
        results.append((y, *torch.autograd.grad(y.sum(), list(layer.randlora_lambda.values()))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("plan", ["", "factored<3", "factored<,merged", "factored<x,merged", "merged,quick", "merged,"])
def test_the_op_refuses_other_plans(plan):
    layer = make_layer(41, 24)
    layer.strategy = plan
    with pytest.raises(ValueError, match="strategy must"):
        layer(normal(3, 41))
