"""What is Hadamard bases' own: the group width and what it does to the rank, and that they take no memory."""

import pytest
import torch
from helpers.common import make_base, normal, randomize, reference_dW, reference_update
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import randlora
from randlora import RandomBases
from randlora.bases import hadamard
from randlora.ops.pattern import is_signs


def group_sizes(m, r, width):
    """Columns of A by what they are equal to, but for their signs."""
    sizes = [0] * (1 << (r - 1).bit_length())
    for j in range(m):
        sizes[j // width % len(sizes)] += 1
    return sizes


sizes = st.integers(1, 400)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(sizes, st.integers(1, 40)), min_size=1, max_size=4), st.integers(1, 70))
def test_the_width_is_the_largest_that_serves_all_layers(layers, r):
    fits = [w for w in hadamard.WIDTHS if all(w * -(-m // (w * hadamard.groups(r))) <= n for m, n in layers)]
    assert hadamard.group_width(layers, r) == max(fits, default=1)
    for m, n in layers if fits else ():
        assert max(group_sizes(m, r, hadamard.group_width(layers, r))) <= n


@settings(deadline=None, max_examples=300)
@given(sizes, st.integers(1, 40), st.integers(1, 70), st.sampled_from(hadamard.WIDTHS))
def test_lost_rank_counts_the_columns_that_bases_cannot_tell_apart(m, n, r, width):
    reached = sum(min(n, size) for size in group_sizes(m, r, width))
    assert hadamard.lost_rank(m, n, r, width) == max(0, min(m, n * r) - reached)


RANKS = [
    (96, 96, 16, None, None), (100, 260, 8, None, None), (260, 100, 8, None, None), (37, 37, 33, None, None),
    (41, 97, 1, None, None), (97, 41, 12, None, None), (64, 80, 5, None, None), (64, 64, 8, 8, None),
    (48, 64, 4, None, 3), (72, 72, 16, 8, None), (90, 100, 16, 8, None), (40, 40, 4, 8, 2),
]  # fmt: skip


@pytest.mark.parametrize(("i", "o", "r", "width", "n"), RANKS)
def test_rank(i, o, r, width, n):
    """Full where the width suits, and otherwise what `explain` says."""
    bases = RandomBases(max(i, o), min(i, o), r, "hadamard", seed=3, num_bases=n, group_width=width)
    layer = randomize(randlora.Linear(make_base(i, o, dtype=torch.float64), r=r, bases=bases, num_bases=n))
    m, n = min(i, o), bases.num_bases
    lost = hadamard.lost_rank(m, n, r, bases.group_width)
    if width is None and n * r >= m:
        assert lost == 0
    assert torch.linalg.matrix_rank(reference_update(layer)).item() == min(m, n * r) - lost
    said = randlora.explain(layer, 10)
    assert f"groups of width {bases.group_width}" in said
    assert (f"cost this layer rank: {min(m, n * r) - lost} in place of {min(m, n * r)}" in said) == (lost > 0)


def test_explain_names_the_width_that_would_do():
    bases = RandomBases(72, 72, 16, "hadamard", group_width=8)
    layer = randlora.Linear(nn.Linear(72, 72), r=16, bases=bases)
    own = RandomBases(72, 72, 16, "hadamard").group_width
    assert own < 8 and f"bases of its own would have width {own}" in randlora.explain(layer, 4)
    dense = randlora.Linear(nn.Linear(72, 72), r=16)
    assert "width" not in randlora.explain(dense, 4)


def test_a_model_gets_the_width_that_suits_all_of_its_layers():
    model = nn.Sequential(nn.Linear(384, 512), nn.ReLU(), nn.Linear(512, 256))
    config = randlora.RandLoraConfig(r=32, kind="hadamard", target_modules=["0", "2"])
    model = randlora.get_peft_model(model, config)
    assert config.group_width is None, "the caller's config stays as it is"
    layers = [(384, 12), (256, 8)]
    width = hadamard.group_width(layers, 32)
    assert width < hadamard.group_width(layers[1:], 32)
    assert model.peft_config["default"].group_width == width
    stores = {layer.bases["default"] for layer in model.modules() if isinstance(layer, randlora.Linear)}
    assert [store.group_width for store in stores] == [width]
    # Another model that takes the same store lets it grow, and nothing else.
    again = randlora.get_peft_model(
        nn.Sequential(nn.Linear(600, 700)),
        randlora.RandLoraConfig(r=32, kind="hadamard", target_modules=["0"], group_width=width),
    )
    (store,) = stores
    assert again.model[0].bases["default"] is store and store.max_dim == 700


def test_what_is_held_is_bits():
    bases = RandomBases(4096, 4096, 32, "hadamard")
    layer = randlora.Linear(nn.Linear(4096, 8), r=32, bases=bases)
    assert bases.nbytes == 0
    layer(normal(3, 4096)).sum().backward()
    assert bases.nbytes == 3 * 4096 // 8
    assert not bases.copies.dense, "dense bases were made"


def test_growing_and_sharding():
    """A store has the signs of a smaller one in front, for any sizes: what a layer computes stays."""
    small = RandomBases(70, 33, 5, "hadamard", seed=9)
    large = RandomBases(300, 200, 5, "hadamard", seed=9, group_width=small.group_width)
    for stream, shape in ((0, (5, 1, 33)), (1, (70, 7, 5))):
        whole = small.tensors(torch.float32)[stream]
        assert torch.equal(whole, large.tensors(torch.float32)[stream][: shape[0], : shape[1], : shape[2]])
        part = torch.empty(3, shape[1], 2)
        assert torch.equal(small.fill(part, stream, (1, 0, 3)), whole[1:4, :, 3:5])
    for a, b, count in zip(small.pattern(33)[0], large.pattern(33)[0], (33, 70, 35), strict=False):
        bits, others = ((t[:, None] >> torch.arange(32) & 1).flatten()[:count] for t in (a, b))
        assert torch.equal(bits, others)


@pytest.mark.parametrize(("i", "o"), [(41, 97), (97, 41)])
def test_the_two_factors_as_they_are(i, o):
    bases = RandomBases(97, 41, 12, "hadamard")
    layer = randomize(randlora.Linear(make_base(i, o, dtype=torch.float64), r=12, bases=bases))
    first, second = layer.get_scaled_bases("default")
    torch.testing.assert_close(layer.scaling["default"] * second @ first, reference_update(layer))


# ---- bases that exist as tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", [(1.0, 1.0), (1.7, 0.3)], ids=str)
@pytest.mark.parametrize(("i", "o", "r", "width"), [(41, 97, 12, 2), (97, 41, 12, 4), (24, 24, 1, 1), (64, 80, 8, 8)])
def test_given_ones_are_recognised(i, o, r, width, factors):
    """As PEFT has them, which reads them from a file: the same fast path, and exactly these values."""
    made = RandomBases(max(i, o) + 6, min(i, o) + 5, r, "hadamard", seed=2**64 - 1, group_width=width)
    A, B = (t * f for t, f in zip(made.tensors(torch.float32), factors, strict=True))
    bases = RandomBases.from_tensors(A, B)
    layer = randomize(randlora.Linear(make_base(i, o, dtype=torch.float64), r=r, bases=bases))
    pattern, scale = bases.pattern(min(i, o))
    assert is_signs(pattern) and scale == pytest.approx(factors[0] * factors[1])
    update = layer.get_delta_weight("default")
    A, B = A.double(), B.double()
    lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    exact = reference_dW(A, B, lam, gamma, layer.scaling["default"], i, o)
    assert (update - exact).abs().max() <= 1e-6 * exact.abs().max()  # the factors are fp32
    assert "hadamard bases" in randlora.explain(layer, 3)


@pytest.mark.parametrize("which", ["A", "B"])
def test_one_other_sign_is_enough_to_be_something_else(which):
    made = RandomBases(97, 41, 12, "hadamard").tensors(torch.float32)
    A, B = (t.clone() for t in made)
    changed = A if which == "A" else B
    changed[5, 0, 7] *= -1
    assert RandomBases.from_tensors(*made).pattern(41) is not None
    assert RandomBases.from_tensors(A, B).pattern(41) is None
