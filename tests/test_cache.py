"""The inference cache: nothing rebuilt from call to call, nothing stale, nothing leaked."""

import copy
import pickle

import pytest
import torch
from common import make_layer, normal, on_devices, reference_forward

import randlora


@pytest.fixture(autouse=True)
def default_settings():
    yield
    randlora.inference_cache(enabled=True, limit=1 << 30)


def used():
    return randlora.inference_cache()["used"]


def cached_layer(x, **arguments):
    """A layer in eval mode that has been called twice with `x`, and so has its update cached."""
    layer = make_layer(x.shape[-1], 24, **arguments).eval()
    with torch.no_grad():
        layer(x)
        assert used() == 0, "one call alone is no reason to build anything"
        layer(x)
    return layer


def builds(layer, x):
    """How often a call builds a scaled base."""
    with torch.profiler.profile() as profile, torch.no_grad():
        layer(x)
    return sum(event.count for event in profile.key_averages() if event.key == "randlora::unique_base")


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_second_call_builds_and_the_next_do_not(dtype, device):
    x = normal(3, 41, dtype=dtype, device=device)
    layer = cached_layer(x, dtype=dtype, device=device)
    assert used() == 41 * 24 * dtype.itemsize
    assert builds(layer, x) == 0
    with torch.no_grad():
        y = layer(x)
    torch.testing.assert_close(y.double(), reference_forward(layer, x), rtol=4 * torch.finfo(dtype).eps, atol=1e-1)
    assert y.dtype == dtype


@on_devices
@pytest.mark.parametrize("change", ["lambda", "gamma", "weight", "scaling", "data", "adapter"])
def test_changes_are_noticed(change, device):
    x = normal(3, 41, dtype=torch.float64, device=device)
    layer = cached_layer(x, dtype=torch.float64, device=device)
    layer.update_layer("other", r=3)
    with torch.no_grad():
        {
            "lambda": lambda: layer.randlora_lambda["default"].mul_(2),
            "gamma": lambda: layer.randlora_gamma["default"].mul_(2),
            "weight": lambda: layer.weight.mul_(2),
            "scaling": lambda: layer.scaling.update(default=7.0),
            "data": lambda: setattr(layer.randlora_lambda["default"], "data", layer.randlora_lambda["default"] * 3),
            "adapter": lambda: layer.set_adapter(["default", "other"]),
        }[change]()
        adapters = layer.active_adapters
        for _ in range(3):
            torch.testing.assert_close(layer(x), reference_forward(layer, x, adapters), rtol=1e-10, atol=1e-10)


def test_an_optimizer_step_is_noticed():
    x = normal(3, 41, dtype=torch.float64)
    layer = cached_layer(x, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    layer(x).sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), reference_forward(layer, x), rtol=1e-10, atol=1e-10)


def test_training_frees_it_and_does_not_use_it():
    x = normal(3, 41)
    layer = cached_layer(x)
    assert used() > 0
    layer.train()
    assert used() == 0
    with torch.no_grad():
        layer(x), layer(x)
    assert used() == 0
    layer.eval()
    layer(x), layer(x)  # with gradients
    assert used() == 0


def test_it_is_in_no_copy_and_no_file():
    x = normal(3, 41)
    layer = cached_layer(x)
    before = used()
    keys = set(layer.state_dict())
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert used() == before and keys == set(make_layer(41, 24).state_dict())
    for other in copies:
        with torch.no_grad():
            torch.testing.assert_close(other(x), layer(x))


def test_switch_and_limit():
    x = normal(3, 41)
    layer = cached_layer(x)
    randlora.inference_cache(enabled=False)
    assert used() == 0 and builds(layer, x) == 1 and builds(layer, x) == 1
    randlora.inference_cache(enabled=True, limit=41 * 24 * 4 - 1)
    with torch.no_grad():
        layer(x), layer(x), layer(x)
    assert used() == 0
    randlora.inference_cache(limit=41 * 24 * 4)
    with torch.no_grad():
        layer(x), layer(x)
    assert used() == 41 * 24 * 4
    randlora.inference_cache(limit=0)
    assert used() == 0
    del layer


def test_bytes_are_given_back_with_the_layer():
    layer = cached_layer(normal(3, 41))
    assert used() > 0
    del layer
    assert used() == 0


def test_inference_mode_and_merge():
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    expected = reference_forward(layer, x)
    with torch.inference_mode():
        for _ in range(3):
            torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-3)
    layer.merge()
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-3)
    layer.unmerge()
    layer.train()
    layer(x).sum().backward()  # an inference tensor in the cache must not get into a graph


def test_hooks_on_the_base_layer_still_run():
    layer = make_layer(41, 24).eval()
    calls = []
    layer.base_layer.register_forward_hook(lambda *a: calls.append(1))
    with torch.no_grad():
        layer(normal(3, 41)), layer(normal(3, 41)), layer(normal(3, 41))
    layer(normal(3, 41))
    assert len(calls) == 4


@pytest.mark.parametrize("arguments", [{"enabled": 1}, {"limit": -1}, {"limit": 1.5}, {"limit": True}], ids=str)
def test_bad_arguments(arguments):
    with pytest.raises((TypeError, ValueError), match=next(iter(arguments))):
        randlora.inference_cache(**arguments)
