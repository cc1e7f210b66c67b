"""The inference cache and torch.func: parameters that come and go in a scope are not mistaken for each other."""

import pytest
import torch
from helpers.common import make_bases, make_layer, normal, on_devices
from torch.func import functional_call, vmap

import randlora


@pytest.fixture(autouse=True)
def scope(monkeypatch):
    """One in which the first call builds."""
    monkeypatch.setattr(randlora.planner, "price_of_update", lambda *_: (1.0, 0.0))
    with randlora.inference_cache() as scope:
        yield scope


SHAPES = [(41, 24, 5), (64, 64, 8), (341, 200, 32), (1000, 341, 32), (768, 768, 32), (1024, 1024, 16)]


def parts(shape, device):
    """A layer in eval mode, an input, lambda, the base output, and what the update adds (it is linear in lambda)."""
    layer = make_layer(*shape, device=device).eval()
    x = normal(3, shape[0], device=device)
    lam = layer.randlora_lambda["default"].detach().clone()
    base = layer.base_layer(x).detach()
    return layer, x, lam, base, layer(x).detach() - base


@on_devices
def test_a_loop_over_temporary_parameters(device, scope):
    """Each tensor is freed before the next is made, often at its address: the cache must not take one for the other."""
    wrong = {}
    for shape in SHAPES:
        layer, x, lam, base, update = parts(shape, device)
        with torch.no_grad():
            results = [functional_call(layer, {"randlora_lambda.default": lam * k}, (x,)) for k in range(1, 30)]
        errors = [((y - base - k * update).norm() / update.norm() / k).item() for k, y in enumerate(results, 1)]
        wrong[shape] = sum(error > 1e-3 for error in errors)
    assert not any(wrong.values()), f"calls out of 29 that used other parameters than they were given: {wrong}"
    assert scope.nbytes > 0


@on_devices
def test_vmap_over_parameters_at_inference(device):
    """An ensemble in eval mode under no_grad, as one evaluates it."""
    layer, x, lam, base, update = parts(SHAPES[0], device)
    with torch.no_grad():
        for _ in range(3):
            y = vmap(lambda lam: functional_call(layer, {"randlora_lambda.default": lam}, (x,)))(
                torch.stack([lam, 2 * lam])
            )
            torch.testing.assert_close(y, torch.stack([base + update, base + 2 * update]), rtol=1e-4, atol=1e-4)


@on_devices
def test_vmap_over_data_at_inference(device):
    layer, _, _, _, _ = parts(SHAPES[0], device)
    x = normal(4, 3, 41, device=device)
    with torch.no_grad():
        expected = torch.stack([layer.train()(one) for one in x])
        layer.eval()
        for _ in range(3):
            torch.testing.assert_close(vmap(layer)(x), expected, rtol=1e-4, atol=1e-4)


@on_devices
def test_an_adapter_of_the_same_name_anew(device, scope):
    layer, x, _, base, _ = parts(SHAPES[2], device)
    bases, r = layer.bases["default"], layer.r["default"]
    with torch.no_grad():
        for factor in range(1, 6):
            layer.delete_adapter("default")
            layer.update_layer("default", r=r, randlora_alpha=r, bases=bases)
            layer.randlora_lambda["default"].fill_(factor)
            layer.randlora_gamma["default"].fill_(0.1)
            expected = base + x @ layer.get_delta_weight("default").T
            for _ in range(3):
                torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert scope.nbytes > 0


@on_devices
def test_other_bases_between_two_calls(device, scope):
    """Those before are freed, and others may get their address."""
    layer, x, _, base, _ = parts(SHAPES[0], device)
    with torch.no_grad():
        for seed in range(20):
            layer(x), layer(x)
            for replacement in (2 * seed, 2 * seed + 1):
                layer.bases["default"] = None
                layer.bases["default"] = make_bases(41, 24, 5, seed=replacement)
            torch.testing.assert_close(layer(x), base + x @ layer.get_delta_weight("default").T, rtol=1e-4, atol=1e-4)
    assert scope.nbytes > 0


@pytest.mark.cuda
def test_a_captured_inference_graph_follows_the_parameters():
    """A graph must not bake in an update that was cached before it, nor cache one that it has not computed yet."""
    layer, x, lam, base, update = parts(SHAPES[0], "cuda")
    parameter = layer.randlora_lambda["default"]
    for warmups in (1, 3):
        with torch.no_grad():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(warmups):
                    layer(x)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = layer(x)
            torch.testing.assert_close(layer(x), base + update, rtol=1e-4, atol=1e-4)
            parameter.mul_(2)
            graph.replay()
            torch.testing.assert_close(y, base + 2 * update, rtol=1e-4, atol=1e-4)
            parameter.copy_(lam)
        layer.train().eval()
