"""Any of a layer's tensors on the meta device: a call, a merge and a save give right numbers, shapes, or an error."""

import pytest
import torch
from helpers.common import KINDS, make_base, normal, randomize, reference_forward
from torch import nn

import randlora

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

few = settings(
    max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip

PARTS = ("weight", "bias", "randlora_lambda", "randlora_gamma", "bases")
cases = st.fixed_dictionaries(
    {
        "on_meta": st.sets(st.sampled_from(PARTS)),
        "sizes": st.sampled_from([(13, 7), (7, 13), (9, 9)]),
        "kind": st.sampled_from(KINDS),
        "given": st.booleans(),
        "strategy": st.sampled_from(["auto", "factored", "materialized", "merged"]),
        "dtype": st.sampled_from([torch.float64, torch.float32]),
        "second": st.booleans(),
        "training": st.booleans(),
        "calls": st.integers(1, 3),
    }
)


def build(case):
    (i, o), r = case["sizes"], 3
    bases = randlora.RandomBases(max(i, o), min(i, o), r, case["kind"])
    if case["given"] or "bases" in case["on_meta"]:
        device = "meta" if "bases" in case["on_meta"] else "cpu"
        bases = randlora.RandomBases.from_tensors(bases.A.to(device), bases.B.to(device))
    layer = randlora.Linear(make_base(i, o, dtype=case["dtype"]), r=r, bases=bases, strategy=case["strategy"])
    if case["second"]:
        layer.update_layer("second", r=2)
        layer.set_adapter(["default", "second"])
    randomize(layer)
    complete = None if "bases" in case["on_meta"] else reference_forward(layer, normal(4, i), layer.active_adapters)
    for part in case["on_meta"] - {"bases"}:
        held, name = (layer.base_layer._parameters, part) if part in PARTS[:2] else (getattr(layer, part), "default")
        held[name] = nn.Parameter(held[name].to("meta"), requires_grad=held[name].requires_grad)
    return layer.train(case["training"]), normal(4, i, dtype=case["dtype"]), complete


@few
@given(cases)
def test_a_call_has_right_numbers_or_none(case):
    layer, x, expected = build(case)
    for _ in range(case["calls"]):
        with torch.set_grad_enabled(case["training"]):
            if case["on_meta"]:
                with pytest.raises(ValueError, match="on the meta device"):
                    layer(x)
            else:
                torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@few
@given(cases)
def test_a_merge_changes_the_weight_or_nothing(case):
    layer, x, expected = build(case)
    names = layer.active_adapters
    if case["on_meta"] - {"bias"}:
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        with pytest.raises(ValueError, match="on the meta device"):
            layer.merge(safe_merge=case["training"])
        assert not layer.merged and layer.active_adapters == names
        after = layer.state_dict()
        assert all(after[name].is_meta if t.is_meta else torch.equal(t, after[name]) for name, t in before.items())
    else:
        layer.merge(safe_merge=case["training"])
        assert layer.merged_adapters == names
        if not case["on_meta"]:
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)
        layer.unmerge()
        assert torch.equal(layer.weight, make_base(*case["sizes"], dtype=case["dtype"]).weight)
