"""Any experts, adapters and routing: outputs and gradients are those of weights with the updates by the formula."""

import pytest
import torch
from helpers.common import KINDS, STRATEGIES, normal
from helpers.experts_cases import adapt, own, parameters_of, random, reference

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

flag = st.booleans()
size = st.sampled_from([1, 2, 3, 5, 8, 13])


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    form=st.fixed_dictionaries(
        {"has_gate": flag, "is_transposed": flag, "has_bias": flag, "has_post_expert_norm": flag}
    ),
    sizes=st.fixed_dictionaries({"num_experts": size, "hidden": size, "inner": size}),
    kind=st.sampled_from(KINDS),
    settings=st.fixed_dictionaries(
        {
            "r": st.sampled_from([1, 2, 5]),
            "num_bases": st.sampled_from([None, 1, 3]),
            "strategy": st.sampled_from(["auto", *STRATEGIES]),
        }
    ),
    routing=st.lists(st.lists(st.integers(0, 13), min_size=2, max_size=2), min_size=1, max_size=9),
    both=flag,
)
def test_outputs_and_gradients(form, sizes, kind, settings, routing, both):
    base = own(**form, **sizes)
    names = None if both else ["down_proj"]
    layer = adapt(base, kind=kind, parameters=names, **settings)
    layer.add_adapter("b", ["down_proj"], r=3, randlora_alpha=2)
    random(layer, seed=3)
    for part in layer.adapted():
        part.set_adapter([name for name in ("default", "b") if name in part.randlora_lambda])
    ids = torch.tensor(routing) % (sizes["num_experts"] + 1)  # the last is nobody's
    hidden = normal(len(ids), sizes["hidden"], seed=4, dtype=torch.float64).requires_grad_()
    weights = normal(*ids.shape, seed=5, dtype=torch.float64).requires_grad_()
    y, expected = layer(hidden, ids, weights), by_reference(layer, hidden, ids, weights)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    wanted = [hidden, weights, *parameters_of(layer, ("default", "b"))]
    got, correct = (torch.autograd.grad(t.square().sum(), wanted, materialize_grads=True) for t in (y, expected))
    for a, b in zip(got, correct, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * max(1.0, b.abs().max().item()))


def by_reference(layer, hidden, ids, weights):
    """What nobody computes is left out: batched_mm, which computes the reference, asks for ids of experts."""
    layer.base_layer._is_expert_parallel = True
    try:
        return reference(layer, (hidden, ids, weights), ("default", "b"))
    finally:
        layer.base_layer._is_expert_parallel = False
