"""The cost model: its formulas, what `auto` takes, and what `explain` says."""

import pytest
import torch
from helpers.common import make_base, make_layer, normal
from helpers.counted import multiply_adds

import randlora
from randlora.costs import hadamard
from randlora.costs.dense import Dense
from randlora.costs.hadamard import Hadamard
from randlora.costs.lists import Lists
from randlora.costs.strategies import LayerCall
from randlora.planner import choose, plan

D = 64


@pytest.mark.parametrize(
    ("strategy", "forward", "backward"),
    [("factored", (3, 0), (4, 0)), ("materialized", (2, 1), (3, 2)), ("merged", (1, 1), (2, 2))],
)
@pytest.mark.parametrize("T", [1, 10, 1000])
def test_square_full_rank_costs_are_the_documented_ones(strategy, forward, backward, T):
    """a T + b d, in units of d^2."""
    cost = Dense(LayerCall(T, D, D, D // 4, 4)).costs()[strategy]
    assert cost[0].multiply_adds == (forward[0] * T + forward[1] * D) * D * D
    assert cost[1].multiply_adds == (backward[0] * T + backward[1] * D) * D * D


@pytest.mark.parametrize("in_features, out_features", [(48, 96), (96, 48)])
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_counts_are_those_of_the_products_that_run(in_features, out_features, needs):
    T, r, n = 40, 8, 6
    need_x, need_parameters = needs

    for strategy in randlora.planner.STRATEGIES:
        layer = make_layer(in_features, out_features, r, bias=False, strategy=strategy)
        x = normal(T, in_features).requires_grad_(need_x)
        for p in (*layer.randlora_lambda.values(), *layer.randlora_gamma.values()):
            p.requires_grad_(need_parameters)
        call = LayerCall(T, in_features, out_features, n, r, need_x=int(need_x), need_parameters=int(need_parameters))
        expected = Dense(call).costs()[strategy]
        with torch.profiler.profile(record_shapes=True) as forward:
            y = layer(x)
        assert multiply_adds(forward) == expected[0].multiply_adds, strategy
        with torch.profiler.profile(record_shapes=True) as backward:
            if y.requires_grad:
                y.sum().backward()
        assert multiply_adds(backward) == expected[1].multiply_adds, strategy


def test_merged_only_where_nothing_is_rounded_away():
    arguments = (1 << 14, 256, 256, 8, 32)
    assert choose(*arguments, torch.float32, torch.float32, "cpu") == ("merged",) * 2
    assert choose(*arguments, torch.float64, torch.float64, "cpu") == ("merged",) * 2
    for dtype, weight_dtype in ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        assert choose(*arguments, dtype, weight_dtype, "cpu") == ("materialized",) * 2
    assert choose(*arguments, torch.float32, torch.float32, "cpu", dropout=True) == ("materialized",) * 2
    assert choose(*arguments, torch.float32, None, "cpu") == ("materialized",) * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_are_factored(dtype):
    assert choose(1, 4096, 4096, 128, 32, dtype, dtype, "cpu") == ("factored",) * 2
    assert choose(0, 4096, 4096, 128, 32, dtype, dtype, "cpu") == ("factored",) * 2


def test_forward_and_backward_are_chosen_apart():
    """Between T = d/2 and T = d: 5T + d instead of 7T or 3T + 3d."""
    d = 2048
    for T, expected in ((d // 4, ("factored",) * 2), (3 * d // 4, ("merged", "factored")), (2 * d, ("merged",) * 2)):
        assert choose(T, d, d, d // 32, 32, torch.float32, torch.float32, "cpu") == expected


@pytest.mark.parametrize(
    "tokens, expected", [(1, ["factored"] * 2), (192, ["merged", "factored"]), (4096, ["merged"] * 2)]
)
def test_explain_names_what_the_layer_does(tokens, expected, capsys):
    layer = randlora.Linear(make_base(256, 256), bases=randlora.RandomBases(256, 256, 32))
    text = randlora.explain(layer, tokens)
    assert capsys.readouterr().out.strip() == text.strip()
    assert [line.split()[0] for line in text.splitlines() if "<- chosen" in line] == expected
    layer.strategy = "materialized"
    forced = [line.split()[0] for line in randlora.explain(layer, tokens).splitlines() if "<- forced" in line]
    assert forced == ["materialized"] * 2


def test_explain_says_what_is_done_where_there_is_no_weight_to_merge_into():
    """A base layer with a hook computes its product itself: the layer takes the cheapest strategy for the update."""
    layer = randlora.Linear(make_base(256, 256), bases=randlora.RandomBases(256, 256, 32), strategy="merged")
    layer.base_layer.register_forward_hook(lambda *_: None)
    lines = randlora.explain(layer, 1).splitlines()
    assert [line.split()[0] for line in lines if "<- chosen" in line] == ["factored"] * 2


def test_explain_counts_inference_without_backward():
    layer = randlora.Linear(make_base(256, 256), bases=randlora.RandomBases(256, 256, 32))
    text = randlora.explain(layer, 100, training=False)
    assert "inference" in text and "0.0 MiB" in text.splitlines()[-1]


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "form",
    [None, "seed", "bits", "planes", "signs", Lists(10, 3.0)],
    ids=["dense", "seed", "bits", "planes", "signs", "lists"],
)
def test_sizes_may_be_symbolic(form, device_type):
    """As they are under torch.compile(dynamic=True), whatever is needed; PyTorch 2.11 is the strictest."""

    def lengths(x, need_x, need_parameters):
        needs = {"need_x": need_x, "need_parameters": need_parameters, "form": form}
        shape = x.shape[1], x.shape[0], 3, 8, torch.float32, torch.float32, device_type
        return x + sum(map(len, plan(*shape, **needs)))

    x = torch.zeros(40, 56)
    for needs in ((True, True), (True, False), (False, True), (False, False)):
        torch.compiler.reset()
        compiled = torch.compile(lengths, fullgraph=True, dynamic=True, backend="eager")
        assert torch.equal(compiled(x, *needs), lengths(x, *needs))


def test_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="strategy must be one of auto, factored, materialized, merged, got 'quick'"):
        make_layer(strategy="quick")


@pytest.mark.parametrize(("i", "o"), [(1024, 1024), (1024, 4096), (4096, 1024)])
def test_hadamard_bases_multiply_with_gamma_alone(i, o):
    """One product with gamma forward and three backward, whatever the rank; transforms beside them."""
    m, M, n, T, free = min(i, o), max(i, o), 32, 100, {"cpu": 0.0, "cuda": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hadamard, "TRANSFORM", free)
        found = Hadamard(LayerCall(T, i, o, n, 32)).costs()
        forward, backward = found["factored"]
        assert forward.multiply_adds == T * (M * m + m * n)
        # A tall layer's dx needs no product, as v is there for dlambda.
        assert backward.multiply_adds == T * (M * m + (3 if i <= o else 2) * m * n)
    for strategy, passes in Hadamard(LayerCall(T, i, o, n, 32)).costs().items():
        assert passes[0].multiply_adds > found[strategy][0].multiply_adds, "transforms cost nothing"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 64, 1024, 16384])
def test_hadamard_bases_build_a_matrix_only_for_many_tokens_and_where_the_sum_is_exact(tokens, dtype):
    for d in (256, 1024, 4096):
        n = -(-d // 32)
        for strategy in choose(tokens, d, d, n, 32, dtype, dtype, "cpu", form="signs"):
            assert strategy == "factored" or (strategy == "merged" and dtype == torch.float32 and tokens >= d)
