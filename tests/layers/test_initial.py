"""``randlora_alpha="auto"``: one step moves any layer as the rule says, and a number for alpha means PEFT's start."""

import math
import random

import pytest
import torch
from helpers import quantized_layers
from helpers.common import KINDS, make_base, make_bases, normal
from torch import nn

import randlora
from randlora.layers.initial import GAIN, GAMMA, ByRule, Shape, alpha_of, start

CASES = [
    # in, out, r, num_bases: square ones, both orientations, full rank and not, ranks that divide the width and do not
    (64, 64, 8, None), (96, 40, 7, None), (40, 96, 7, None), (100, 61, 32, 3), (61, 100, 16, 5), (48, 48, 48, None),
]  # fmt: skip


def step_along_gradient(layer, tokens):
    """How far one step of Adam moves the output against its gradient, for one random token: rms over that of x, by lr.

    The mean over `tokens` of them, and the same of all that moves.
    """
    lam, along, moved = layer.randlora_lambda["default"], [], []
    xs, gradients = (normal(tokens, size, dtype=torch.float64, seed=s) for s, size in
                     enumerate((layer.in_features, layer.out_features)))  # fmt: skip
    for x, gradient in zip(xs, gradients, strict=True):
        y = layer(x)
        (slope,) = torch.autograd.grad(y @ gradient, lam)
        with torch.no_grad():
            lam.copy_(-slope.sign())
            moves = (layer(x) - y) / x.square().mean().sqrt()
            lam.zero_()
        along.append(-(moves @ gradient) / gradient.norm() / layer.out_features**0.5)
        moved.append(moves.square().mean().sqrt())
    return torch.stack(along).mean().item(), torch.stack(moved).mean().item()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_moves_every_layer_alike(kind):
    means = []
    for seed, (i, o, r, n) in enumerate(CASES):
        bases = make_bases(i, o, r, kind=kind, seed=seed, num_bases=n)
        layer = randlora.Linear(make_base(i, o, dtype=torch.float64), "default", None, None, r, "auto", bases=bases,
                                num_bases=n)  # fmt: skip
        P = layer.num_bases["default"] * r
        along, moved = step_along_gradient(layer, 96)
        means.append(along / (2 / math.pi * GAIN))
        assert 0.75 < means[-1] < 1.25, (i, o, r, n, means[-1])
        across = GAIN * (o / P if i <= o else 2 / math.pi * o / r) ** 0.5
        # Hadamard bases have columns that are orthogonal, and move less.
        low = 0.7 if kind == "hadamard" else 0.9
        assert low < moved / math.hypot(2 / math.pi * GAIN, across) < 1.15, (i, o, r, n)
    assert abs(sum(means) / len(means) - 1) < 0.07, means


def test_the_formula():
    rng = random.Random(0)
    for _ in range(100):
        r = rng.randint(1, 128)
        layers = [Shape(*(rng.randint(1, high) for high in (5000, 5000, 64))) for _ in range(rng.randint(1, 9))]
        alpha = alpha_of(r, layers)
        assert alpha == alpha_of(r, reversed(layers)) == float(f"{alpha:.6g}")
        gammas = [start(ByRule(alpha), r, layer)[1] for layer in layers]
        for gamma, (i, o, n) in zip(gammas, layers, strict=True):
            assert math.isclose(alpha / r * gamma * n * r * math.sqrt(i / o), GAIN)
        assert math.isclose(math.prod(gamma ** (1 / len(gammas)) for gamma in gammas), GAMMA, rel_tol=1e-5)
        assert start("auto", r, layers[0]) == start(ByRule(alpha_of(r, layers[:1])), r, layers[0])


def start_of(layer, name="default"):
    return layer.randlora_alpha[name], layer.randlora_gamma[name].unique().tolist(), layer.randlora_lambda[name].any()


def test_a_layer_by_itself():
    layer = randlora.Linear(make_base(41, 24), r=5, randlora_alpha="auto")
    gamma = torch.tensor(start("auto", 5, Shape(41, 24, 5))[1]).item()
    assert math.isclose(gamma, GAMMA, rel_tol=1e-5)
    assert start_of(layer) == (alpha_of(5, [Shape(41, 24, 5)]), [gamma], False)
    layer.update_layer("random", r=5, randlora_alpha="auto", init_weights=False)
    assert start_of(layer, "random") == (layer.randlora_alpha["default"], [torch.tensor(1 / 41).item()], True)
    layer.update_layer("pefts", r=5)
    assert start_of(layer, "pefts") == (640, [torch.tensor(1 / 24).item()], False)
    layer.update_layer("many", r=5, num_bases=30)
    assert start_of(layer, "many")[1] == [torch.tensor(1 / 30).item()]

    expected = {name: start_of(layer, name)[1:] for name in layer.randlora_lambda}
    expected["random"] = expected["default"]
    empty = layer.to("meta").to_empty(device="cpu")
    for parameter in empty.parameters():
        parameter.data.fill_(7.0)
    empty.reset_parameters()
    assert {name: start_of(layer, name)[1:] for name in layer.randlora_lambda} == expected
    layer.delete_adapter("random")
    assert layer.initial_gamma.keys() == layer.r.keys()


@pytest.mark.parametrize("alpha", ["Auto", "", "640", None, True, [1.0]])
def test_what_is_neither_a_number_nor_auto(alpha):
    message = r"randlora_alpha must be a number or 'auto', got "
    for make in (
        lambda: randlora.Linear(make_base(5, 4), r=2, randlora_alpha=alpha),
        lambda: randlora.MultiheadAttention(nn.MultiheadAttention(8, 2), r=2, randlora_alpha=alpha),
        lambda: randlora.RandLoraConfig(r=2, randlora_alpha=alpha),
    ):
        with pytest.raises(TypeError, match=message):
            make()


def test_the_projections_of_an_attention_have_one_alpha():
    attention = randlora.MultiheadAttention(nn.MultiheadAttention(12, 2, kdim=30), r=4, randlora_alpha="auto")
    layers = [getattr(attention, name) for name in attention.projections]
    assert len({layer.randlora_alpha["default"] for layer in layers}) == 1
    assert_on_the_rule(layers)
    attention.add_adapter("one", ("k_proj",), r=3, randlora_alpha="auto")
    assert attention.k_proj.randlora_alpha["one"] == alpha_of(3, [Shape(30, 12, 4)])
    assert_on_the_rule([attention.k_proj], "one")


def assert_on_the_rule(layers, name="default"):
    for layer in layers:
        gamma = layer.randlora_gamma[name]
        reach = layer.r[name] * layer.num_bases[name] * (layer.in_features / layer.out_features) ** 0.5
        torch.testing.assert_close(gamma * (layer.scaling[name] * reach), torch.full_like(gamma, GAIN))


@pytest.mark.parametrize("kind", [*quantized_layers.HERE, "Conv1D", "own"])
def test_other_layers_have_the_same_start(kind):
    if kind == "Conv1D":
        base = pytest.importorskip("transformers.pytorch_utils").Conv1D(24, 40)
    elif kind == "own":
        base = nn.Identity()
        base.in_features, base.out_features = 40, 24
    else:
        base = quantized_layers.make_base(kind, 40, 24)
    layer = randlora.Linear(base, r=5, randlora_alpha="auto")
    assert layer.randlora_alpha["default"] == alpha_of(5, [Shape(40, 24, 5)])
    assert_on_the_rule([layer])


def test_experts_have_one_alpha():
    cases = pytest.importorskip("helpers.experts_cases")
    experts = randlora.Experts(cases.own(), r=3, randlora_alpha="auto")
    assert len({layer.randlora_alpha["default"] for layer in experts.adapted()}) == 1
    assert_on_the_rule(experts.adapted())
    with pytest.raises(TypeError, match="num_bases must be an integer"):
        experts.add_adapter("bad", r=3, randlora_alpha="auto", num_bases="3")
    with pytest.raises(TypeError, match="randlora_alpha must be a number or 'auto'"):
        experts.add_adapter("bad", r=3, randlora_alpha="Auto")
    assert all(list(layer.r) == ["default"] for layer in experts.adapted())
