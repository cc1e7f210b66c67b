"""All experts' products at once (randlora/layers/experts_grouped.py), which GPUs take, here on the CPU.

grouped_mm has a CPU form of the same meaning. On a GPU, where it is one kernel, test_experts_cuda.py looks at it.
"""

import copy

import pytest
import torch
from helpers.common import KINDS, assert_same_bits, over
from helpers.experts_cases import (
    FORMS,
    TOP_K,
    E,
    adapt,
    experts_of,
    families,
    inputs,
    own,
    parameters_of,
    random,
    reference,
)
from helpers.experts_grouped_cases import in_turn, made, seen_calls, step  # noqa: F401

import randlora
from randlora.layers import experts_choice


def in_double(arguments):
    return tuple(t.detach().double() if t.is_floating_point() else t for t in arguments)


def exact(layer, arguments):
    arguments = tuple(t.requires_grad_() if t.is_floating_point() else t for t in in_double(arguments))
    y = reference(layer, arguments)
    wanted = [arguments[0], arguments[2], *parameters_of(layer)]
    return y, *torch.autograd.grad(y.square().sum(), wanted)


def errors(found, true):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True)]


@families
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_get_what_the_formula_gives(seen, family, kind, monkeypatch):
    layer = made(family, kind)
    for routing in ("even", "uneven", "one"):
        arguments = inputs(TOP_K[family], routing, torch.float32)
        for room in (1 << 20, 1):  # 1: one expert at a time
            monkeypatch.setattr(experts_choice, "WORKSPACE", room)
            seen.clear()
            assert max(errors(step(layer, arguments), exact(layer, arguments))) < 2e-6
            assert len(seen) == 2


@families
def test_rounding_is_no_worse_than_expert_by_expert(seen, family):
    """In bfloat16: lambda's and gamma's gradients are sums over a matrix that grouped_mm rounds."""
    layer, arguments = made(family, dtype=torch.bfloat16), inputs(TOP_K[family], dtype=torch.bfloat16)
    true = exact(layer, arguments)
    together = errors(step(layer, arguments), true)
    assert len(seen) == 2
    with in_turn():
        alone = errors(step(layer, arguments), true)
    assert len(seen) == 2 and together != alone
    assert all(a < max(1.5 * b, 0.004) for a, b in zip(together, alone, strict=True)), (together, alone)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parameters", [None, ["down_proj"]], ids=str)
def test_every_form_of_experts(seen, form, parameters):
    """Also one adapted part of two: the other's products are grouped as well."""
    layer = adapt(own(torch.float32, inner=24, **FORMS[form]), r=8, parameters=parameters)
    arguments = inputs(2, dtype=torch.float32)
    assert max(errors(step(layer, arguments), exact(layer, arguments))) < 2e-6
    assert len(seen) == len(layer.adapted())


def test_only_the_gradients_that_are_wanted(seen):
    layer = made("Mixtral")
    whole = dict(zip(("y", "x", "w"), step(layer, inputs(2, dtype=torch.float32)), strict=False))
    hidden, ids, weights = (t.detach() for t in inputs(2, dtype=torch.float32))
    y = layer(hidden.requires_grad_(), ids, weights)
    (dx,) = torch.autograd.grad(y.square().sum(), [hidden])
    assert_same_bits(dx, whole["x"])
    for part in layer.adapted():
        part.randlora_lambda["default"].requires_grad_(False)
    hidden.requires_grad_(False)
    layer(hidden, ids, weights).sum().backward()
    for part in layer.adapted():
        assert part.randlora_lambda["default"].grad is None and part.randlora_gamma["default"].grad.any()
    with torch.no_grad():
        assert_same_bits(layer(hidden, ids, weights), y)
    assert len(seen) == 8


def test_experts_without_tokens_get_zeros(seen):
    layer = made("Mixtral")
    layer(*inputs(2, "one", torch.float32)).sum().backward()
    for p in parameters_of(layer):
        others = [e for e in range(E) if e != 4]
        assert p.grad[4].any() and not p.grad[others].any()
    assert len(seen) == 2


@pytest.mark.filterwarnings("ignore:the active adapter")
@over("change", ["train", "scaling", "delete"])
def test_derivatives_of_gradients_are_of_the_call(seen, change):
    """Dropout, scale and bases are what they were in the forward."""
    layer, arguments = made("Mixtral", randlora_dropout=0.5), inputs(2, dtype=torch.float32)
    wanted = [arguments[0], *parameters_of(layer)]
    expected = torch.autograd.grad(layer(*arguments).square().sum(), wanted)
    y = layer(*arguments)
    for part in layer.adapted():
        if change == "train":
            part.train()
        elif change == "scaling":
            part.scaling["default"] *= 3
        else:
            part.update_layer("b", r=2)
            part.delete_adapter("default")
    found = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    assert len(seen) == 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_derivatives_of_gradients(seen):
    """By the calls of each expert, which can be differentiated any number of times."""
    layer, arguments = made("GptOss"), inputs(2, dtype=torch.float32)
    wanted = [arguments[0], *parameters_of(layer)]

    def twice():
        y = layer(*arguments)
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), wanted)

    together = twice()
    assert len(seen) == 2
    with in_turn():
        assert max(errors(together, [t.double() for t in twice()])) < 1e-5


def test_torch_func_goes_expert_by_expert(seen):
    layer, (hidden, ids, weights) = made("Mixtral"), inputs(2, dtype=torch.float32)
    hidden, weights = hidden.detach(), weights.detach()
    found = torch.func.grad(lambda x: layer(x, ids, weights).square().sum())(hidden)
    assert not seen
    y = layer(hidden.requires_grad_(), ids, weights)
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), hidden)[0], rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


def test_the_default_device_does_not_matter(seen):
    layer, arguments = made("GptOss"), inputs(2, dtype=torch.float32)
    expected = step(layer, arguments)
    with torch.device("meta"):
        found = step(layer, arguments)
    assert all(map(torch.equal, found, expected)) and len(seen) == 4


def test_rows_that_begin_anywhere(seen):
    """grouped_mm wants addresses that 16 divides."""
    layer = made("Mixtral")
    part = layer.adapted()[1]
    rows = torch.randn(6 * 24 + 1)[1:].reshape(6, 24).requires_grad_()
    assert rows.data_ptr() % 16
    counts = [1, 0, 2, 3, 0]
    y = part(rows, counts, part.weight, None)
    grad = torch.randn(6 * 16 + 1)[1:].reshape(6, 16)
    (dx,) = torch.autograd.grad(y, [rows], grad)
    weight = (part.weight.double() + part.get_delta_weight("default").double()).detach()
    expert = torch.tensor(counts).cumsum(0)
    for i in range(6):
        W = weight[int((expert <= i).sum())]
        torch.testing.assert_close(y[i].double(), W @ rows[i].double(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx[i].double(), grad[i].double() @ W, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_a_copy_of_a_layer_and_its_graph_are_on_their_own(seen):
    """What a graph keeps is of the call: lambda may be another tensor when backward runs."""
    layer, arguments = made("Mixtral"), inputs(2, dtype=torch.float32)
    expected = step(layer, arguments)
    y = layer(*arguments)
    wanted = [arguments[0], arguments[2], *parameters_of(layer)]
    other = random(copy.deepcopy(layer), seed=7)
    for part, changed in zip(layer.adapted(), other.adapted(), strict=True):
        part.randlora_lambda["default"] = torch.nn.Parameter(changed.randlora_lambda["default"].detach())
    for a, b in zip(torch.autograd.grad(y.square().sum(), wanted), expected[1:], strict=True):
        assert_same_bits(a, b)


@pytest.mark.filterwarnings("ignore:the active adapter")
@over("kind", ["dense", "hadamard"])
def test_backward_needs_nothing_of_the_layer(seen, kind):
    """An adapter may be deleted, and others come, between forward and backward."""
    layer, arguments = made("Mixtral", kind), inputs(2, dtype=torch.float32)
    expected = step(layer, arguments)
    wanted = [arguments[0], arguments[2], *parameters_of(layer)]
    y = layer(*arguments)
    layer.add_adapter("b", r=2, randlora_alpha=4)
    for part in layer.adapted():
        part.delete_adapter("default")
    for a, b in zip(torch.autograd.grad(y.square().sum(), wanted), expected[1:], strict=True):
        assert_same_bits(a, b)


def test_given_bases_that_are_written_to_meanwhile(seen):
    """As everywhere: an error, not the gradient of other bases."""
    A, B = torch.randn(8, 1, 16), torch.randn(48, 2, 8)
    layer = randlora.Experts(
        experts_of("Mixtral", torch.float32, even=True), parameters=["gate_up_proj"], r=8, randlora_alpha=16,
        bases=randlora.RandomBases.from_tensors(A, B),
    )  # fmt: skip
    y = layer(*inputs(2, dtype=torch.float32))
    assert len(seen) == 1
    B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
