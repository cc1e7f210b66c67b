"""The two factors of one layer's update, of any shape, against the formula and its SVD in float64."""

import pytest
import torch
from helpers.common import FORMS, reference_update
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora.export.update import Factors, LayerUpdate


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.none() | st.integers(1, 6), st.sampled_from([*FORMS]),
    st.integers(1, 50), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_any_layer(in_features, out_features, r, n, form, rank, seed, dtype):
    m, M = sorted((in_features, out_features))
    bases = randlora.RandomBases(M + 3, m + 2, r, seed=seed, num_bases=(n or -(-m // r)) + 1, **FORMS[form])
    layer = randlora.Linear(nn.Linear(in_features, out_features, dtype=dtype), r=r, num_bases=n, bases=bases)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (layer.randlora_lambda["default"], layer.randlora_gamma["default"]):
            parameter.normal_(generator=generator)
        expected = reference_update(layer, "default")
        S = torch.linalg.svdvals(expected)
        update = LayerUpdate(layer, "default", rank)
        A, B = update.factors(rank)
        norm, lost = update.norms(Factors(A, B))
        needed = LayerUpdate(layer, "default").rank_for(0.75)
    most = min(m, r * layer.num_bases["default"])
    assert update.rank == most and A.shape == (min(rank, most), in_features) and B.shape == (out_features, len(A))
    noise = 100 * torch.finfo(dtype).eps * S.norm()
    found = B.double() @ A.double()
    assert (found - expected).norm() <= S[rank:].norm() * (1 + 1e-6) + noise
    torch.testing.assert_close(torch.linalg.svdvals(found), S * (torch.arange(m) < rank), rtol=1e-5, atol=noise.item())
    assert norm == pytest.approx(S.norm().item(), rel=1e-5)
    assert lost == pytest.approx((found - expected).norm().item(), rel=1e-4, abs=noise.item())
    kept = S.square().cumsum(0) / S.square().sum() if norm else torch.ones(m)
    assert kept[needed - 1] >= 0.75 - 1e-5 and (needed == 1 or kept[needed - 2] < 0.75 + 1e-5)
    # powers of two have made them of one size
    largest_A, largest_B = A.abs().amax(dim=1), B.abs().amax(dim=0)
    both = (largest_A > 0) & (largest_B > 0)
    assert ((largest_B.log2() - largest_A.log2())[both].abs() <= 2.01).all()


def test_what_is_kept_is_small():
    """Of few bases the factors, which are not multiplied; of many dW, and no factors beside it."""
    for n, dense in ((1, False), (2, False), (3, True), (8, True)):
        layer = randlora.Linear(nn.Linear(64, 80), r=8, num_bases=n)
        update = LayerUpdate(layer, "default", 4)
        assert (update.matrix is not None) == dense == (update.left is None) == (update.right is None)
    assert LayerUpdate(layer, "default", 64).matrix is None  # exact


def test_norms_of_any_size():
    layer = randlora.Linear(nn.Linear(300, 400), r=8, num_bases=3)
    with torch.no_grad():
        for parameter in (layer.randlora_lambda["default"], layer.randlora_gamma["default"]):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        for factor in (1.0, 1e-25, 1e45):  # what has squares, and what fp32 has none of: of 1e-25, then of 1e20
            layer.randlora_lambda["default"].mul_(factor**0.5).mul_(factor**0.5)
            expected = reference_update(layer, "default").norm().item()
            update = LayerUpdate(layer, "default", 24)
            A, B = update.factors(24)
            norm, lost = update.norms(Factors(A * 0.5, B))
            assert norm == pytest.approx(expected, rel=1e-6, abs=0) and lost == pytest.approx(norm / 2, rel=1e-6, abs=0)
