"""All experts' products at once (randlora/layers/experts_grouped.py), which GPUs take, here on the CPU.

grouped_mm has a CPU form of the same meaning. On a GPU, where it is one kernel, test_experts_cuda.py looks at it.
"""

import copy

import pytest
import torch
from helpers.common import KINDS, assert_same_bits, over
from helpers.counted import SavedBytes
from helpers.experts_cases import (
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
from helpers.experts_grouped_cases import made, seen_calls  # noqa: F401
from torch.utils._python_dispatch import TorchDispatchMode

import randlora
from randlora.layers import experts_grouped

TOP_K = {"Mixtral": 2, "Qwen3Moe": 3, "GptOss": 2}


def in_double(arguments):
    return tuple(t.detach().double() if t.is_floating_point() else t for t in arguments)


def step(layer, arguments):
    """The output, and the gradients of the tokens, of their weights and of all trained parameters."""
    y = layer(*arguments)
    wanted = [t for t in (arguments[0], arguments[2], *parameters_of(layer)) if t.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), wanted)


def exact(layer, arguments):
    arguments = tuple(t.requires_grad_() if t.is_floating_point() else t for t in in_double(arguments))
    y = reference(layer, arguments)
    wanted = [arguments[0], arguments[2], *parameters_of(layer)]
    return y, *torch.autograd.grad(y.square().sum(), wanted)


def errors(found, true):
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True)]


@families
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_get_what_the_formula_gives(seen, family, kind):
    layer = made(family, kind)
    for routing in ("even", "uneven", "one"):
        arguments = inputs(TOP_K[family], routing, torch.float32)
        for workspace in (0, 1):  # 1: one expert at a time
            for part in layer.adapted():
                part.workspace = workspace
            seen.clear()
            assert max(errors(step(layer, arguments), exact(layer, arguments))) < 2e-6
            assert len(seen) == 2


@families
def test_rounding_is_no_worse_than_expert_by_expert(seen, family, monkeypatch):
    """In bfloat16: lambda's and gamma's gradients are sums over a matrix that grouped_mm rounds."""
    layer, arguments = made(family, dtype=torch.bfloat16), inputs(TOP_K[family], dtype=torch.bfloat16)
    true = exact(layer, arguments)
    together = errors(step(layer, arguments), true)
    assert len(seen) == 2
    monkeypatch.setattr(experts_grouped, "DEVICES", ())
    alone = errors(step(layer, arguments), true)
    assert len(seen) == 2 and together != alone
    assert all(a < max(1.5 * b, 0.004) for a, b in zip(together, alone, strict=True)), (together, alone)


FORMS = {
    "no gate": {},
    "no gate, transposed, bias": {"is_transposed": True, "has_bias": True},
    "gate, bias, norm": {"has_gate": True, "has_bias": True, "has_post_expert_norm": True},
}


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


def test_derivatives_of_gradients(seen, monkeypatch):
    """By the calls of each expert, which can be differentiated any number of times."""
    layer, arguments = made("GptOss"), inputs(2, dtype=torch.float32)
    wanted = [arguments[0], *parameters_of(layer)]

    def twice():
        y = layer(*arguments)
        first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
        return torch.autograd.grad(sum(t.square().sum() for t in first), wanted)

    together = twice()
    assert len(seen) == 2
    monkeypatch.setattr(experts_grouped, "DEVICES", ())
    assert max(errors(together, [t.double() for t in twice()])) < 1e-5


def test_torch_func_goes_expert_by_expert(seen):
    layer, (hidden, ids, weights) = made("Mixtral"), inputs(2, dtype=torch.float32)
    hidden, weights = hidden.detach(), weights.detach()
    found = torch.func.grad(lambda x: layer(x, ids, weights).square().sum())(hidden)
    assert not seen
    y = layer(hidden.requires_grad_(), ids, weights)
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), hidden)[0], rtol=1e-4, atol=1e-4)
    assert len(seen) == 2


@over("kind", ["dense", "hadamard"])
def test_what_is_kept_for_backward(seen, kind):
    """As expert by expert: the tokens of each part. Bases that were made for the call are made again."""
    layer, arguments = made("Mixtral", kind), inputs(2, dtype=torch.float32)
    assert kept(layer, arguments) == kept_alone(layer, arguments)
    assert len(seen) == 2


def kept(layer, arguments):
    known = [*layer.parameters(), *arguments]
    for part in layer.adapted():
        known += part.pattern("default") or part.bases["default"].tensors(torch.float32, arguments[0].device)
    with SavedBytes(known) as saved:
        layer(*arguments)
    return saved.bytes


def kept_alone(layer, arguments):
    devices, experts_grouped.DEVICES = experts_grouped.DEVICES, ()
    try:
        return kept(layer, arguments)
    finally:
        experts_grouped.DEVICES = devices


class Largest(TorchDispatchMode):
    """The largest result of the op that makes scaled bases."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.randlora.unique_base.default:
            self.bytes = max(self.bytes, result.nbytes)
        return result


@pytest.mark.parametrize("experts", [1, 2, 5])
def test_the_workspace_bounds_the_scaled_bases(seen, experts):
    """They, their gradient and a copy of it exist at once."""
    layer, arguments = made("Mixtral", parameters=["down_proj"]), inputs(2, "even", torch.float32)
    (part,) = layer.adapted()
    n, m = part.randlora_gamma["default"].shape[1:]
    of_one = 8 * n * m * 4
    part.workspace = 4 * of_one * experts
    with Largest() as largest:
        step(layer, arguments)
    assert largest.bytes == of_one * experts


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
