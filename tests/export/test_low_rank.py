"""Best approximations of a rank against LAPACK's SVD in float64, for spectra of every form."""

import pytest
import torch
from helpers.common import normal, over
from hypothesis import given, settings
from hypothesis import strategies as st

from randlora.export import low_rank

D = 120
INDEX = torch.arange(D, dtype=torch.float64)
SPECTRA = {
    "flat": 1 - 0.9 * INDEX / D,
    "equal": torch.ones_like(INDEX),
    "1/i": 1 / (INDEX + 1),
    "fast": torch.exp(-INDEX / 4),
    "low rank": (INDEX < 9).double(),
    "low rank and a tail": (INDEX < 9).double() + 1e-3 * (1 - INDEX / D),
    "clusters": torch.where(INDEX < 7, 1.0, torch.where(INDEX < 60, 0.5, 0.1)).double(),
    "one": (INDEX == 0).double(),
    "zero": torch.zeros_like(INDEX),
}


def matrix(a, b, spectrum, dtype=torch.float64):
    """``[a, b]`` of these singular values between random orthonormal factors."""
    U, V = (torch.linalg.qr(normal(size, len(spectrum), seed=i, dtype=torch.float64)).Q for i, size in ((1, a), (2, b)))
    return ((U * spectrum) @ V.T).to(dtype)


def assert_best(B, A, M, rank, computed_in=None):
    """The product is as near to `M` as the best of this rank, and B's columns have the singular values as norms."""
    dtype, M = M.dtype, M.double()
    S = torch.linalg.svdvals(M)
    noise = 40 * torch.finfo(computed_in or dtype).eps * M.norm()
    assert B.shape == (len(M), rank) and A.shape == (rank, M.shape[1]) and B.dtype == A.dtype == dtype
    # Norms are taken of columns that were made orthogonal by their Gram matrix.
    torch.testing.assert_close(B.double().norm(dim=0), S[:rank], rtol=1e-5, atol=max(noise, 1e-8 * M.norm()))
    best = S[rank:].norm()
    assert (M - B.double() @ A.double()).norm() <= best * (1 + 1e-6) + noise


@pytest.fixture
def small(monkeypatch):
    """As if the whole was too large for LAPACK's SVD; and what is decomposed as a whole all the same."""
    monkeypatch.setattr(low_rank, "SMALL", 10)
    wholes = []
    of_whole = low_rank._of_whole
    monkeypatch.setattr(low_rank, "_of_whole", lambda *a: wholes.append(a) or of_whole(*a))
    monkeypatch.setattr(low_rank, "_BLOCK", 1000)
    return wholes


@over("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_best_approximation(name, dtype, small):
    S = SPECTRA[name]
    for a, b in ((D, D), (300, D), (D, 131)):
        M = matrix(a, b, S, dtype)
        for rank in (1, 5, 20, D - 1):
            assert_best(*low_rank.truncated(M, rank), M, rank)
    assert small  # large ranks are not for the Krylov method
    found = low_rank.singular_values(M)
    torch.testing.assert_close(found, torch.linalg.svdvals(M.double()), rtol=1e-6, atol=1e-7)


@over("dtype", [torch.float32, torch.float64])
def test_krylov_finds_it_without_the_whole(dtype, small):
    d = 600
    M = normal(d, d, seed=3, dtype=dtype) @ normal(d, d, seed=4, dtype=dtype)
    B, A = low_rank.truncated(M, 12)
    assert not small
    assert_best(B, A, M, 12)
    U, S, V = torch.linalg.svd(M.double())
    torch.testing.assert_close(B.double().norm(dim=0), S[:12], rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0)
    best = (U[:, :12] * S[:12]) @ V[:12]
    assert (B.double() @ A.double() - best).norm() < (1e-3 if dtype == torch.float32 else 1e-8) * best.norm()
    again = low_rank.truncated(M.clone(), 12)
    assert torch.equal(B, again[0]) and torch.equal(A, again[1])


@over("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("base", [0.5, 0.9])
def test_neither_the_size_of_numbers_nor_how_they_fall_matters(base, dtype, small):
    """Squares of them leave the range of fp32, and the accuracy of fp64, long before they do."""
    spectrum = base ** torch.arange(200, dtype=torch.float64)
    for scale in (1e-36, 1e-25, 1.0, 1e25, 1e37) if dtype == torch.float32 else (1.0,):
        for a, b in ((220, 200), (200, 220)):
            M = matrix(a, b, scale * spectrum).to(dtype)
            for rank in (1, 12, 30):
                B, A = low_rank.truncated(M, rank)
                assert_best(B.double() / scale, A.double(), M.double() / scale, rank, dtype)
    assert not small


@over("dtype", [torch.float32, torch.float64])
def test_products_are_not_built(dtype):
    left, right = normal(90, 13, seed=1, dtype=dtype), normal(13, 47, seed=2, dtype=dtype)
    for rank in (1, 6, 12):
        assert_best(*low_rank.product_truncated(left, right, rank), left @ right, rank)
    found = low_rank.product_singular_values(left, right)
    torch.testing.assert_close(found, torch.linalg.svdvals((left @ right).double())[:13], rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 40), st.integers(2, 40), st.data(), st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(a, b, data, dtype, seed):
    rank, inner = data.draw(st.integers(1, min(a, b) - 1)), data.draw(st.integers(1, 50))
    M = normal(a, inner, seed=seed, dtype=dtype) @ normal(inner, b, seed=seed + 1, dtype=dtype)
    assert_best(*low_rank.truncated(M, rank), M, rank)


def test_rank_for_a_share_of_the_energy():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)  # squares: 9, 4, 1 of 14
    shares = {0.01: 1, 9 / 14: 1, 0.65: 2, 13 / 14: 2, 0.93: 3, 1.0: 3}
    assert {share: low_rank.rank_for(values, share, 1e-16) for share in shares} == shares
    assert low_rank.rank_for(torch.zeros(3), 0.9, 1e-16) == 1
    # What rounding makes of nothing is nothing.
    M = (normal(80, 5, seed=1) @ normal(5, 60, seed=2)).float()
    assert low_rank.rank_for(low_rank.singular_values(M), 1.0, torch.finfo(torch.float32).eps) == 5
