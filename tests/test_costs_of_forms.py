"""The costs of ternary bases: what the planner says of each form, against what runs and what its bases hold."""

import itertools

import pytest
import torch
from helpers.common import STRATEGIES, make_bases, make_layer, normal
from helpers.counted import multiply_adds
from helpers.ternary import FORMS

import randlora
from randlora import planner
from randlora.costs.lists import Lists
from randlora.costs.strategies import LayerCall

T, R = 40, 8
orientations = pytest.mark.parametrize("in_features, out_features", [(480, 960), (960, 480)])
strategies = pytest.mark.parametrize("strategy", STRATEGIES)


def products(form, in_features, out_features, strategy):
    """Multiply-adds of the dense products that run, forward and backward, and the bases of the layer."""
    bases = make_bases(in_features, out_features, R, **FORMS[form])
    layer = make_layer(in_features, out_features, R, bias=False, strategy=strategy, bases=bases)
    x = normal(T, in_features).requires_grad_()
    with torch.profiler.profile(record_shapes=True) as forward:
        y = layer(x)
    with torch.profiler.profile(record_shapes=True) as backward:
        y.sum().backward()
    return multiply_adds(forward), multiply_adds(backward), bases


@pytest.mark.parametrize("form, packed", [("bits", "bits"), ("sign", "bits"), ("planes", "planes")])
@strategies
@orientations
def test_packed_bases_run_the_products_that_are_counted(form, packed, strategy, in_features, out_features):
    """Of planes, products that build an update are not dense ones: they count less, and the others in full."""
    *ran, _ = products(form, in_features, out_features, strategy)
    said = planner.costs_of(LayerCall(T, in_features, out_features, 480 // R, R), packed)[strategy]
    builds = (0, 0) if strategy == "factored" or packed == "bits" else (1, 2)
    build = 480 * in_features * out_features
    for counted, cost, times in zip(ran, said, builds, strict=True):
        rest = cost.multiply_adds - counted
        assert 0.4 * times * build <= rest <= 0.5 * times * build


@strategies
@orientations
def test_lists_run_what_their_non_zeros_take(strategy, in_features, out_features):
    """Dense products with the columns that A has non-zeros in; and additions, by the weights that were measured."""
    *ran, bases = products("lists", in_features, out_features, strategy)
    A, B = bases.draw(torch.float64, torch.device("cpu"))
    columns = int(A[:, 0].any(dim=0).sum())
    lists = planner.form(bases.pattern(480)[0])
    assert lists.columns == columns < 480
    base, part = T * in_features * out_features, T * max(in_features, out_features) * columns
    through_dW = part if strategy == "materialized" else 0
    assert ran == [base + through_dW] * 2
    coefficients, entries = 480 // R * int(A.count_nonzero()), int(B.count_nonzero())  # C's and B's
    up, down = 4.9 * T * (coefficients + entries), 3.5 * T * (coefficients + entries)
    wide = in_features <= out_features
    additions = {
        "factored": (up if wide else down, down + (3.5 * T * coefficients if wide else up)),
        "materialized": (0, down),
        "merged": (0, down),
    }[strategy]
    said = planner.costs_of(LayerCall(T, in_features, out_features, 480 // R, R), lists)[strategy]
    for counted, cost, more in zip(ran, said, additions, strict=True):
        assert cost.multiply_adds - counted == pytest.approx(more, rel=0.1)


def test_packed_and_sparse_bases_take_less_arithmetic_than_dense_ones():
    lists = planner.form(randlora.RandomBases(1024, 1024, 32, kind="very_sparse").pattern(1024)[0])
    call = LayerCall(1024, 1024, 1024, 32, 32)
    options = [planner.costs_of(call, form) for form in (None, "planes", lists)]
    for which, strategy in itertools.product((0, 1), ("materialized", "merged")):
        costs = [found[strategy][which].multiply_adds for found in options]
        assert costs[0] > costs[1] > costs[2]


@pytest.mark.parametrize("shape", [(512, 512), (128, 512), (512, 128)], ids=str)
def test_density_is_told_from_the_shapes_of_a_pattern(shape):
    """Also of a layer that uses part of a larger store."""
    m, M = min(shape), max(shape)
    bases = randlora.RandomBases(2048, 600, 32, kind="very_sparse", sparsity=20)
    form = planner.form(bases.pattern(m)[0])
    assert form.density(m, M, 32) == pytest.approx(1 / 20, rel=0.25)
    full = Lists(m, 20.0)  # no empty column to tell from
    assert full.density(m, M, 32) == pytest.approx(20 / M)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("size", [(768, 768), (768, 3072), (3072, 768)], ids=str)
def test_bases_that_are_made_anew_change_no_choice(size, device):
    """All strategies make all of B once in a pass. So results are those with bases that are kept."""
    for tokens, dtype, dropout in itertools.product((1, 64, 700, 9000), (torch.float32, torch.bfloat16), (False, True)):
        arguments = (*size, 24, 32, dtype, dtype, device)
        assert planner.choose(tokens, *arguments, dropout=dropout, form="seed") == planner.choose(
            tokens, *arguments, dropout=dropout
        )
        assert planner.plan(*arguments, dropout=dropout, form="seed") == planner.plan(*arguments, dropout=dropout)
    call = LayerCall(700, *size, 24, 32, device_type=device)
    kept, made = planner.costs_of(call, None), planner.costs_of(call, "seed")
    for strategy, which in itertools.product(STRATEGIES, (0, 1)):
        a, b = kept[strategy][which], made[strategy][which]
        assert (b.multiply_adds, b.workspace - a.workspace) == (a.multiply_adds, 4 * 768 * max(size))
        assert b.traffic - a.traffic == {"cpu": 8, "cuda": 5}[device] * 768 * max(size)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bits_cost_what_making_them_dense_takes(device):
    """Traffic in every strategy, once for each pass that needs B; on the CPU not their dense size in temporaries."""
    d, r, tokens = 4096, 32, 512
    unpacked = scaled = dense_update = 4 * d * d
    hidden, gradient = 4 * tokens * d, 4 * d * d
    dense = planner.costs_of(LayerCall(tokens, d, d, d // r, r), None)
    bits = planner.costs_of(LayerCall(tokens, d, d, d // r, r, device_type=device), "bits")
    for strategy, which in itertools.product(STRATEGIES, (0, 1)):
        a, b = dense[strategy][which], bits[strategy][which]
        assert a.multiply_adds == b.multiply_adds
        passes = 2 if which and strategy != "factored" else 1  # for dx, and for the parameters
        assert b.traffic == a.traffic + passes * 2 * unpacked
        assert b.workspace <= a.workspace + (8 << 20 if device == "cpu" else unpacked)
    # 4 MiB of B are two of 32 rows of A, in all matrices that have them as an axis.
    share = r // 2 if device == "cpu" else 1
    assert bits["factored"][0].workspace == (scaled + hidden + unpacked) // share
    assert bits["factored"][1].workspace == (scaled + hidden + gradient + unpacked) // share
    assert bits["materialized"][0].workspace == (scaled + unpacked) // share + dense_update
    assert (bits["factored"][0].workspace < dense["factored"][0].workspace) == (device == "cpu")
