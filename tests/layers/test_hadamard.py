"""Layers with Hadamard bases do what those with dense ones do, and never make a dense base for it."""

import copy

import pytest
import torch
from helpers.attention_cases import E, adapt, make_inputs, updates
from helpers.attention_cases import make_base as make_attention
from helpers.common import (
    HALVES,
    assert_no_worse_than_plain,
    make_bases,
    make_layer,
    normal,
    over,
    reference_forward,
    reference_update,
)
from helpers.models import tiny_gpt2
from torch import nn
from torch.utils.checkpoint import checkpoint

import randlora

SHAPES = [(41, 97, 12), (97, 41, 12), (64, 64, 8), (33, 40, 33), (3, 5, 4), (384, 640, 32)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture(autouse=True)
def no_dense_bases(monkeypatch):
    """What the reference in these tests makes, it makes of a store of its own."""

    def draw(self, dtype, device):
        assert self.kind != "hadamard" or dtype == torch.float64, "dense bases were made"
        return original(self, dtype, device)

    original = randlora.RandomBases.draw
    monkeypatch.setattr(randlora.RandomBases, "draw", draw)


def hadamard_layer(i, o, r, **arguments):
    return make_layer(i, o, r, bases=make_bases(i, o, r, kind="hadamard", seed=3), **arguments)


def assert_near(got, exact, limit=1e-5):
    assert (got.double() - exact.double()).abs().max() <= limit * exact.abs().max()


@shapes
@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized", "merged"])
def test_outputs_and_gradients(shape, strategy):
    layer = hadamard_layer(*shape, strategy=strategy)
    x = normal(2, 9, shape[0]).requires_grad_()
    y = layer(x)
    assert_near(y, reference_forward(layer, x))
    g = normal(*y.shape, seed=8)
    y.backward(g)
    update = reference_update(layer)
    assert_near(x.grad, g.double() @ (layer.weight + update))
    lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    # dW is linear in each of them.
    products = (g.double().flatten(0, 1).T @ x.detach().double().flatten(0, 1)) * update
    for p in (lam, gamma):
        assert ((p.grad.double() * p.detach()).sum() - products.sum()).abs() <= 1e-5 * products.norm()


@shapes
def test_update_as_a_matrix_and_merging(shape):
    layer = hadamard_layer(*shape).eval()
    x, before = normal(5, shape[0]), layer.weight.clone()
    exact = reference_update(layer)
    assert_near(layer.get_delta_weight("default"), exact)
    y = layer(x)
    layer.merge(safe_merge=True)
    assert_near(layer.weight - before, exact, 1e-4)
    assert_near(layer(x), y)
    layer.unmerge()
    assert torch.equal(layer.weight, before)


def test_differentiable_updates():
    layer = hadamard_layer(41, 97, 12, dtype=torch.float64)
    lam, gamma = (p["default"] for p in (layer.randlora_lambda, layer.randlora_gamma))
    g = normal(97, 41, seed=9, dtype=torch.float64)
    got = torch.autograd.grad((layer.get_delta_weight("default") * g).sum(), (lam, gamma))
    for part, p in zip(got, (lam, gamma), strict=True):
        assert_near((part * p).sum(), (reference_update(layer) * g).sum(), 1e-10)


@over("dtype", HALVES)
@shapes
def test_16_bits(shape, dtype):
    layer = hadamard_layer(*shape, dtype=dtype)
    assert layer.randlora_lambda["default"].dtype == torch.float32
    x = normal(50, shape[0], dtype=dtype)
    exact = reference_forward(layer, x)
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    plain = plain + nn.functional.linear(x, reference_update(layer).to(dtype))
    assert_no_worse_than_plain(layer(x).detach(), plain, exact)


def test_autocast_gives_16_bits_and_fp32_gradients():
    layer = hadamard_layer(41, 97, 12)
    x = normal(7, 41).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert_near(y, reference_forward(layer, x), 0.02)
    y.float().sum().backward()
    assert x.grad.dtype == layer.randlora_gamma["default"].grad.dtype == torch.float32


def test_dropout_is_that_of_dense_bases_with_the_same_values():
    layer = hadamard_layer(64, 96, 8, randlora_dropout=0.3)
    bases = layer.bases["default"].to(torch.float64)
    dense = make_layer(64, 96, 8, randlora_A=bases.A.float(), randlora_B=bases.B.float(), randlora_dropout=0.3)
    dense.load_state_dict(layer.state_dict())
    dense.bases["default"].pattern = lambda *_: None  # as if they were not recognised
    x = normal(30, 64)
    found = []
    for each in (layer, dense):
        torch.manual_seed(5)
        found.append(each.train()(x))
    assert_near(found[0], found[1])
    assert (layer.eval()(x) - found[0]).abs().max() > 0.1


def test_checkpointing_and_bitwise_repeats():
    layer = hadamard_layer(97, 41, 12, randlora_dropout=0.25).train()
    x = normal(64, 97)

    def run(call):
        torch.manual_seed(1)
        layer.zero_grad()
        t = x.clone().requires_grad_()
        y = call(t)
        y.square().sum().backward()
        return [y.detach(), t.grad, *(p.grad.clone() for p in layer.parameters() if p.grad is not None)]

    once = run(layer)
    for call in (layer, lambda t: checkpoint(layer, t, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(once, run(call), strict=True))


def test_copies_share_their_bases():
    layer = hadamard_layer(41, 97, 12)
    again = copy.deepcopy(layer)
    assert again.bases["default"] is layer.bases["default"]
    x = normal(3, 41)
    assert torch.equal(again(x), layer(x))


def test_the_inference_cache_leaves_it_alone():
    x = normal(3, 41)
    layer, other = hadamard_layer(41, 97, 12).eval(), make_layer(41, 97, 12).eval()
    with torch.no_grad(), randlora.inference_cache() as scope:
        expected = layer(x)
        for _ in range(300):
            assert torch.equal(layer(x), expected)
        assert scope.nbytes == 0
        for _ in range(300):
            other(x)
        assert scope.nbytes > 0
    layer.update_layer("dense", r=12, bases=make_bases(41, 97, 12))
    layer.set_adapter(["default", "dense"])
    with torch.no_grad(), randlora.inference_cache() as scope:  # beside one that gains by it
        expected = layer(x)
        for _ in range(300):
            assert_near(layer(x), expected)
        assert scope.nbytes > 0


def test_attention():
    base = make_attention(batch_first=True)
    inputs = make_inputs(base)
    attention = adapt(copy.deepcopy(base), bases=make_bases(30, E, 5, kind="hadamard"))
    dW = updates(attention)
    by_hand = copy.deepcopy(base)
    with torch.no_grad():
        by_hand.in_proj_weight += torch.cat([dW[name] for name in ("q_proj", "k_proj", "v_proj")])
        by_hand.out_proj.weight += dW["out_proj"]
    torch.testing.assert_close(attention(*inputs)[0], by_hand(*inputs)[0], rtol=1e-9, atol=1e-9)
    attention.q_proj.merge()
    torch.testing.assert_close(attention(*inputs)[0], by_hand(*inputs)[0], rtol=1e-9, atol=1e-9)


def test_conv1d():
    model = randlora.get_peft_model(
        tiny_gpt2(), randlora.RandLoraConfig(r=4, kind="hadamard", target_modules=["c_attn", "c_proj"])
    ).eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "randlora_" in name:
                p.copy_(normal(*p.shape, seed=i) * 0.02)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        y = model(ids).logits
        merged = copy.deepcopy(model).merge_and_unload()(ids).logits
    assert_near(merged, y, 1e-4)
    assert (tiny_gpt2()(ids).logits - y).abs().max() > 1e-3


def test_torch_func_and_vmap():
    layer = hadamard_layer(24, 41, 5, dtype=torch.float64)
    x = normal(6, 24, dtype=torch.float64)
    names = ("randlora_lambda.default", "randlora_gamma.default")
    parameters = {name: layer.get_parameter(name).detach() for name in names}

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    whole = torch.func.grad(loss)(parameters, x)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    tangents = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, along = torch.func.jvp(lambda p: loss(p, x), (parameters,), (tangents,))
    for name in names:
        torch.testing.assert_close(each[name].sum(0), whole[name])
    torch.testing.assert_close(along, sum(g.sum() for g in whole.values()))
    torch.testing.assert_close(torch.func.jacrev(layer)(x[0]), layer.weight + reference_update(layer))


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_compiled_graph_for_forward_and_backward(dynamic):
    torch._dynamo.reset()
    layer = hadamard_layer(41, 97, 12)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (7, 300, 9):
        x = normal(tokens, 41).requires_grad_()
        y = layer(x)
        (expected,) = torch.autograd.grad(y.sum(), x)
        again = compiled(x)
        assert_near(again, y, 1e-6)
        assert_near(torch.autograd.grad(again.sum(), x)[0], expected, 1e-6)
