"""``functional.linear`` through autograd, with arguments of any size, dtype, form and layout, against float64.

`tests/ops/test_fuzz.py` tries the ops themselves; here is what lies between them and who calls ``linear``.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.common import FORMS, normal, reference_dW
from helpers.op_arguments import Draw, Layer
from hypothesis import given, settings
from hypothesis import strategies as st

import randlora
from randlora.functional import delta_weight, flat_bases, linear, sparse_delta_weight

STRATEGIES = ("auto", "factored", "materialized", "merged")


def call_and_reference(d):
    """The arguments of a call, its output and gradients, and both in float64."""
    layer = Layer(d)
    strategy = d.of(STRATEGIES)
    p = 0.0 if strategy == "merged" else d.of((0.0, 0.0, 0.5))
    shape = d.of(((), (0,), (d.int(0, 40),), (2, d.int(0, 3)), (1, 2, 2), (d.int(1, 3), 1)))
    with_weight, transposed = strategy == "merged" or d.chance(0.7), d.chance(0.3)
    x = d.laid_out(d.normal(*shape, layer.i, dtype=layer.dtype))
    size = (layer.i, layer.o) if transposed else (layer.o, layer.i)
    weight = d.laid_out(d.normal(*size, dtype=layer.dtype)) if with_weight else None
    bias = d.laid_out(d.normal(layer.o, dtype=layer.dtype)) if with_weight and d.chance(0.5) else None
    A, B = (None, None) if layer.A is None else map(d.laid_out, (layer.A, layer.B))
    g, seed = d.laid_out(d.normal(*shape, layer.o, dtype=layer.dtype)), d.seed()

    may_train = (True, with_weight and strategy != "merged", bias is not None, True, True)
    inputs = x, weight, bias, layer.lam, layer.gamma
    trained = [i for i, may in enumerate(may_train) if may and d.chance(0.2 if i == 1 else 0.7)] or [3]
    exact = [None if t is None else t.double().requires_grad_() for t in inputs]
    ours = [None if t is None else t.detach().requires_grad_(i in trained) for i, t in enumerate(inputs)]

    y = linear(
        *ours[:3], A, B, *ours[3:], 0.7 * layer.scale, p, strategy=strategy, out_features=layer.o,
        weight_is_transposed=transposed, workspace=d.of((0, 0, 1, 5000, 2**62)), seed=seed if p else None,
        pattern=layer.pattern or None,
    )  # fmt: skip
    xs, ws, bs, lam, gamma = exact
    dropped = xs * torch.ops.randlora.dropout(torch.ones(x.shape, dtype=torch.float64), seed, p) if p else xs
    update = layer.update(lam, gamma, 0.7)
    if A is not None:
        update = reference_dW(A, B, lam, gamma, 0.7 * layer.scale, layer.i, layer.o)
    expected = F.linear(dropped, update)
    if with_weight:
        expected = expected + F.linear(xs, ws.t() if transposed else ws, bs)
    assert y.dtype == layer.dtype and y.shape == expected.shape and not y._is_view()
    got = [y.detach().clone()]
    y *= 2  # an ordinary tensor
    got += torch.autograd.grad(y, [ours[i] for i in trained], g)
    gradients = torch.autograd.grad(2 * expected, [exact[i] for i in trained], g.double())
    assert [t.dtype for t in got[1:]] == [ours[i].dtype for i in trained]
    return layer, list(zip(got, (expected, *gradients), strict=True))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.integers(0, 2**31))
def test_outputs_and_gradients(seed):
    layer, pairs = call_and_reference(Draw(seed))
    for got, expected in pairs:
        assert got.shape == expected.shape
        if got.numel():
            # Sums may be of terms that cancel: of one number, nothing says how large they were.
            size = expected.detach().abs().max().clamp_min(1.0)
            assert float((got - expected.detach()).abs().max() / size) <= layer.tolerance


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(1, 40), (40, 1), (1, 1), (5, 9), (9, 5)], ids=str)
def test_weights_of_any_strides(form, shape):
    """Of one row or column, both strides may be 1, or neither, and elements may be one and the same memory."""
    in_features, out_features = shape
    m = min(shape)
    bases = randlora.RandomBases(max(shape), m, 2, **FORMS[form])
    A, B = bases.draw(torch.float64, torch.device("cpu"))
    lam, gamma, x = (
        normal(*size, seed=i, dtype=torch.float64)
        for i, size in enumerate([(2, bases.num_bases), (bases.num_bases, m), (3, in_features)])
    )
    found = bases.pattern(m)
    memory = normal(2500, dtype=torch.float64)
    update = F.linear(x, reference_dW(A, B, lam, gamma, bases.scale, in_features, out_features))
    for transposed, strides in itertools.product((False, True), itertools.product((0, 1, 2, 3, 50), repeat=2)):
        weight = memory.as_strided(shape if transposed else shape[::-1], strides)
        for strategy in STRATEGIES[1:]:
            y = linear(
                x, weight, None, *((A, B) if found is None else (None, None)), lam, gamma, bases.scale,
                strategy=strategy, weight_is_transposed=transposed, pattern=found and found[0],
            )  # fmt: skip
            torch.testing.assert_close(y, update + x @ (weight if transposed else weight.t()))


def arguments(**changed):
    return dict(
        x=normal(3, 32), weight=None, bias=None, A=normal(4, 1, 32), B=normal(64, 8, 4), randlora_lambda=normal(4, 8),
        randlora_gamma=normal(8, 32), scaling=1.0, out_features=64,
    ) | changed  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [{"x": None}, {"x": [1.0]}, {"randlora_lambda": None}, {"randlora_gamma": 1.0}, {"scaling": "1"}, {"scaling": None},
     {"strategy": None}, {"out_features": 64.0}, {"workspace": 1.5}, {"workspace": None}, {"seed": 3, "dropout": 0.5},
     {"pattern": "abcde"}, {"pattern": [1, 2]}, {"pattern": normal(5, 3)}, {"dropout": "a"}],
    ids=str,
)  # fmt: skip
def test_arguments_of_other_types(changed):
    name = next(iter(changed))
    with pytest.raises(TypeError, match=None if name == "dropout" else name):
        linear(**arguments(**changed))


@pytest.mark.parametrize("shape, device", [
    ((7, 0), "cpu"), ((0, 7, 0), "cpu"), ((3, 1, 5), "cpu"), ((2**32, 0, 5), "cpu"), ((0, 0, 2**32), "cpu"),
    ((0, 0, 7), "meta"),
], ids=str)  # fmt: skip
def test_a_tensor_that_says_no_seed(shape, device):
    pattern = [torch.empty(shape, dtype=torch.int8, device=device)]
    with pytest.raises(ValueError, match=r"seed must have shape \[upper 32 bits, 0, lower 32 bits\]|device of x"):
        linear(**arguments(A=None, B=None, pattern=pattern))
    if device == "cpu":
        with pytest.raises(ValueError, match="seed must have shape"):
            torch.ops.randlora.check_pattern(pattern)


@pytest.mark.parametrize("changed", [{"workspace": -1}, {"workspace": 2**63}, {"pattern": [normal(3)]}], ids=str)
def test_arguments_of_other_values(changed):
    with pytest.raises(ValueError, match=next(iter(changed))):
        linear(**arguments(**changed))


@pytest.mark.parametrize("function", [flat_bases, delta_weight])
@pytest.mark.parametrize("on_meta", [{0}, {1}, {2}, {3}, {0, 2, 3}], ids=str)
def test_matrices_of_tensors_partly_on_meta(function, on_meta):
    """PyTorch multiplies a real matrix by one on meta, and gives memory that nobody has written to."""
    tensors = normal(4, 1, 32), normal(64, 8, 4), normal(4, 8), normal(8, 32)
    with pytest.raises(ValueError, match="meta"):
        function(*(t.to("meta") if i in on_meta else t for i, t in enumerate(tensors)), 1.0, 32, 64)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dense"])
@pytest.mark.parametrize("sizes", [(16, 64), (32, 20), (-4, 64), (0, 64)], ids=str)
def test_updates_of_other_sizes_than_gamma(form, sizes):
    bases = randlora.RandomBases(64, 32, 4, **FORMS[form])
    pattern, scale = bases.pattern(32)
    for given_pattern in (pattern, list(pattern)):
        with pytest.raises(ValueError, match=r"gamma must have shape|must be at least 1, got (-4|0)"):
            sparse_delta_weight(given_pattern, scale, normal(4, 8), normal(8, 32), 1.0, *sizes)


@pytest.mark.parametrize("form", [form for form in FORMS if form != "dense"])
def test_patterns_of_more_columns_than_the_bases_have(form):
    bases = randlora.RandomBases(64, 16, 4, **FORMS[form])
    for min_dim in (17, 64, 2**70, 0, -5):
        with pytest.raises(ValueError, match="min_dim"):
            bases.pattern(min_dim)
    with pytest.raises(TypeError, match="min_dim"):
        bases.pattern(8.0)
    bases.require(64, 40, 10)
    assert bases.pattern(40)[0].min_dim == 40


def test_bases_do_not_grow_to_what_is_no_size():
    bases = randlora.RandomBases(64, 16, 4)
    for sizes, error in (((100.5, 16, 4), TypeError), ((2**40, 16, 4), ValueError)):
        with pytest.raises(error, match="max_dim"):
            bases.require(*sizes)
    assert (bases.max_dim, bases.min_dim, bases.num_bases) == (64, 16, 4)


@pytest.mark.parametrize("i", [0, 1])
def test_given_bases_are_strided(i):
    given_bases = [normal(4, 1, 16), normal(16, 4, 4)]
    given_bases[i] = given_bases[i].to_sparse()
    with pytest.raises(TypeError, match=r"randlora_[AB] must be a dense"):
        randlora.RandomBases.from_tensors(*given_bases)


@pytest.mark.parametrize("tokens, error", [(-1, ValueError), (1.5, TypeError), ("a", TypeError), (None, TypeError)])
def test_explaining_no_number_of_tokens(tokens, error):
    layer = randlora.Linear(torch.nn.Linear(8, 8), r=2)
    with pytest.raises(error, match="tokens"):
        randlora.explain(layer, tokens)
