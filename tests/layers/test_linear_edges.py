"""randlora.Linear where it is easy to be silently wrong: names, contexts, repetition, what is left after an error."""

import copy

import pytest
import torch
from helpers.common import (
    HALVES,
    make_base,
    make_bases,
    make_layer,
    normal,
    on_devices,
    over,
    randomize,
    reference_forward,
    reference_update,
)  # fmt: skip
from torch import nn

import randlora

ATTRIBUTES = ["train", "type", "keys", "items", "pop", "update", "forward", "training", "half"]  # of nn.Module


def books(layer):
    """Everything a layer keeps per adapter."""
    kept = (layer.r, layer.num_bases, layer.randlora_alpha, layer.scaling, layer.bases)
    modules = (layer.randlora_dropout, layer.randlora_lambda, layer.randlora_gamma)
    return [list(d) for d in (*kept, *modules)]


# ---- names ----


@pytest.mark.parametrize("name", ["default", "0", "a b", "weight", "lambda"])
def test_names_that_work(name):
    layer = make_layer(adapter_name="first")
    layer.update_layer(name, r=5)
    randomize(layer)
    layer.set_adapter(name)
    x = normal(3, 41)
    assert f"randlora_lambda.{name}" in layer.state_dict()
    torch.testing.assert_close(layer(x).double(), reference_forward(layer, x, [name]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["", "a.b", "task/one", None, 3, *ATTRIBUTES])
def test_names_that_are_refused(name):
    """Those of nn.Module's own attributes, as nn.ParameterDict and nn.ModuleDict cannot have them as keys."""
    layer = make_layer(adapter_name="first")
    before = books(layer)
    if not isinstance(name, str):
        error, message = TypeError, f"must be a string, got {name}"
    elif name in ATTRIBUTES:
        error, message = ValueError, f"{name!r} is taken by torch.nn's containers"
    else:
        error, message = ValueError, f"must not .*, got {name!r}"
    with pytest.raises(error, match=f"adapter_name {message}"):
        layer.update_layer(name, r=5)
    assert books(layer) == before, "refused, but something was left behind"


def test_naming_an_adapter_twice_applies_it_once():
    x = normal(3, 41)
    for act in (
        lambda layer: layer.merge(adapter_names=["default", "default"]),
        lambda layer: layer.set_adapter(["default", "default"]),
    ):
        layer = make_layer()
        expected = reference_forward(layer, x)
        act(layer)
        assert layer.active_adapters == ["default"] and layer.merged_adapters in ([], ["default"])
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", [5, [normal(5, 1, 24)], "A"], ids=["int", "list", "str"])
def test_bases_that_are_none(given):
    with pytest.raises(TypeError, match=f"randlora_A must be .*, got {type(given).__name__}"):
        randlora.Linear(make_base(41, 24), r=5, randlora_A=given, randlora_B=given)


def test_a_refused_layer_leaves_the_shared_store_as_it_was():
    first = randlora.Linear(make_base(41, 24), r=11)
    store = first.bases["default"]
    dims = store.max_dim, store.min_dim, store.num_bases
    for bad in ({"randlora_dropout": 1.0}, {"num_bases": 0}, {"init_weights": 2}, {"adapter_name": "a.b"}):
        with pytest.raises((TypeError, ValueError), match=next(iter(bad))):
            randlora.Linear(make_base(500, 400), r=11, **bad)
        assert (store.max_dim, store.min_dim, store.num_bases) == dims, bad


# ---- sizes and shapes ----


@on_devices
@pytest.mark.parametrize("leading", [(), (1,), (3,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("shape", [(41, 24), (24, 41)], ids=str)
def test_any_leading_shape(leading, shape, device):
    layer = make_layer(*shape, dtype=torch.float64, device=device)
    x = normal(*leading, shape[0], dtype=torch.float64, device=device).requires_grad_()
    y = layer(x)
    assert y.shape == (*leading, shape[1])
    torch.testing.assert_close(y, reference_forward(layer, x), rtol=1e-10, atol=1e-10)
    y.sum().backward()
    expected = (layer.weight + reference_update(layer)).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=1e-10)
    if not x.numel():
        assert (layer.randlora_lambda["default"].grad == 0).all()


@on_devices
@pytest.mark.parametrize("in_features", [1, 3, 41, 341, 1000])
@pytest.mark.parametrize("out_features", [1, 3, 41, 341, 1000])
def test_every_pair_of_odd_sizes_with_gradients(in_features, out_features, device):
    layer = make_layer(in_features, out_features, r=7, dtype=torch.float64, device=device)
    x = normal(2, in_features, dtype=torch.float64, device=device).requires_grad_()
    g = normal(2, out_features, seed=6, dtype=torch.float64, device=device)
    lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    got = (layer(x), *torch.autograd.grad(layer(x), (x, lam, gamma), g))
    A, B = layer.bases["default"].tensors(torch.float64, x.device)

    def plain(x, lam, gamma):
        (r, n), m = lam.shape, min(in_features, out_features)
        p = torch.arange(r * n, device=device)
        S2 = (lam[:, :, None] * A[:, :, :m] * gamma)[p // n, p % n]
        B2 = B[: max(in_features, out_features)][:, p // r, p % r]
        update = (x @ S2.T) @ B2.T if in_features <= out_features else (x @ B2) @ S2
        return nn.functional.linear(x, layer.weight, layer.bias) + layer.scaling["default"] * update

    y = plain(x, lam, gamma)
    for a, b in zip(got, (y, *torch.autograd.grad(y, (x, lam, gamma), g)), strict=True):
        scale = b.abs().max() + 1
        torch.testing.assert_close(a / scale, b / scale, rtol=1e-10, atol=1e-10)


@on_devices
def test_strided_inputs(device):
    layer = make_layer(dtype=torch.float64, device=device)
    wide = normal(6, 5, 82, dtype=torch.float64, device=device)
    for x in (wide[:, :, :41], wide[:, :, ::2], wide.transpose(0, 1)[..., 41:], wide[:1, :1, :41].expand(4, 3, 41)):
        torch.testing.assert_close(layer(x), reference_forward(layer, x), rtol=1e-10, atol=1e-10)


# ---- contexts ----


@on_devices
@over("parameter_dtype", (torch.float32, torch.float64))
def test_autocast_does_not_touch_merging(parameter_dtype, device):
    """Computed in fp32 or fp64 and rounded once, wherever merge() is called from."""
    layer = make_layer(64, 64, dtype=parameter_dtype, device=device)
    expected = layer.get_delta_weight("default").detach()
    bases = [t.detach() for t in layer.get_scaled_bases("default")]
    other = copy.deepcopy(layer)
    layer.merge()
    with torch.autocast(device, torch.bfloat16):
        delta = other.get_delta_weight("default")
        again = other.get_scaled_bases("default")
        other.merge(safe_merge=True)
    assert torch.equal(other.weight, layer.weight), "the merged weight was rounded to 16 bits on the way"
    for got, exact in zip((delta, *again), (expected, *bases), strict=True):
        assert got.dtype == parameter_dtype and torch.equal(got, exact)


def test_merging_under_inference_mode_can_be_undone_and_trained():
    layer = make_layer(dtype=torch.bfloat16)
    before = layer.weight.clone()
    with torch.inference_mode():
        layer.merge()
        layer(normal(2, 41, dtype=torch.bfloat16))
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    layer(normal(2, 41, dtype=torch.bfloat16)).sum().backward()
    assert layer.randlora_lambda["default"].grad.abs().sum() > 0


@over("dtype", HALVES)
def test_16_bit_layers_compute_in_16_bits_and_merge_in_32(dtype):
    layer = make_layer(dtype=dtype)
    exact = reference_update(layer)
    delta = layer.get_delta_weight("default")
    assert delta.dtype == torch.float32 and ((delta - exact).norm() / exact.norm()).item() < 1e-5


def test_training_one_adapter_leaves_the_others():
    layer = make_layer()
    layer.update_layer("other", r=7, bases=make_bases(41, 24, 7))
    randomize(layer)
    layer.set_adapter("other")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(normal(3, 41)).square().sum().backward()
    optimizer.step()
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {"randlora_lambda.other", "randlora_gamma.other"}
