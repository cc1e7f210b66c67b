"""Any adapter in the place of any other of its kind: as if its file had been loaded."""

import tempfile

import pytest
import torch
from helpers.models import net
from helpers.swapped import load, with_all

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["dense", "hadamard", "sparse", "very_sparse", "sign"]),
    r=st.sampled_from([1, 3, 4, 13, 16]),
    num_bases=st.sampled_from([None, 1, 3]),
    targets=st.sets(st.sampled_from(["q_proj", "v_proj", "up_proj", "down_proj"]), min_size=1),
    alphas=st.tuples(*[st.sampled_from([1, 2, 3, 7, -4, 0.5])] * 2),
    saved=st.booleans(),
    bias=st.sampled_from(["none", "all", "randlora_only"]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    projections=st.booleans(),
)
def test_as_if_the_file_had_been_loaded(kind, r, num_bases, targets, alphas, saved, bias, dtype, projections):
    rest = {"kind": kind, "r": r, "num_bases": num_bases, "target_modules": sorted(targets), "bias": bias}
    rest |= {"modules_to_save": ["head"] if saved else None, "save_projection": projections}
    model, other = (with_all(i, dtype, randlora_alpha=alpha, **rest) for i, alpha in zip((1, 2), alphas, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        expected = load(folder, net(dtype)).state_dict()
        model.hotswap(folder)
    for name, value in model.state_dict().items():
        wanted = expected[name]
        if "randlora_lambda" in name:
            wanted = (wanted.double() * (alphas[1] / alphas[0])).to(wanted.dtype)
        assert torch.equal(value, wanted), name
