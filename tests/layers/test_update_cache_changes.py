"""The inference cache: inside an open scope, nothing that moves a version counter or replaces a tensor is missed."""

import pytest
import torch
from helpers.cache_cases import assert_exact, call_until_kept, hold_up, relative_error
from helpers.common import make_bases, make_layer, normal, on_devices, randomize, reference_forward
from torch.multiprocessing.reductions import StorageWeakRef

import randlora

DOUBLE = dict(dtype=torch.float64)


@on_devices
@pytest.mark.parametrize("change", ["lambda", "gamma", "weight", "scaling", "data", "adapter", "bases", "state dict"])
def test_changes_are_noticed(change, device):
    x = normal(3, 41, **DOUBLE, device=device)
    layer = make_layer(41, 24, **DOUBLE, device=device).eval()
    layer.update_layer("other", r=3)
    randomize(layer)
    lam = layer.randlora_lambda["default"]
    other = {name: 3 * value for name, value in layer.state_dict().items()}
    with torch.no_grad(), randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        {
            "lambda": lambda: lam.mul_(2),
            "gamma": lambda: layer.randlora_gamma["default"].mul_(2),
            "weight": lambda: layer.weight.mul_(2),
            "scaling": lambda: layer.scaling.update(default=7.0),
            "data": lambda: setattr(lam, "data", lam * 3),
            "adapter": lambda: layer.set_adapter(["default", "other"]),
            "bases": lambda: layer.bases.update(default=make_bases(41, 24, 5, seed=9)),
            "state dict": lambda: layer.load_state_dict(other),
        }[change]()
        assert_exact(layer, x, layer.active_adapters, calls=40)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizer_steps_are_noticed(optimizer, foreach):
    x = normal(3, 41, **DOUBLE)
    layer = make_layer(41, 24, **DOUBLE).eval()
    optimizer = optimizer([p for p in layer.parameters() if p.requires_grad], lr=0.1, foreach=foreach)
    layer(x).sum().backward()
    with randlora.inference_cache() as scope:
        for _ in range(2):
            call_until_kept(scope, layer, x)
            optimizer.step()
            assert_exact(layer, x)


@pytest.mark.parametrize("training", [False, True])
def test_a_scope_around_training_with_a_fused_optimizer(training):
    """Its steps move no version counter, but they follow a call with gradients."""
    x = normal(3, 41, **DOUBLE)
    layer = make_layer(41, 24, **DOUBLE)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=True)
    with randlora.inference_cache() as scope:
        for _ in range(3):
            layer.train(training)
            layer(x).sum().backward()
            assert scope.nbytes == 0
            optimizer.step()
            layer.eval()
            assert_exact(layer, x)
            call_until_kept(scope, layer, x)


def test_training_mode_uses_and_keeps_nothing():
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    with randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        with torch.no_grad():
            for _ in range(40):
                layer.train()(x)
        assert scope.nbytes == 0
        for _ in range(40):
            layer.eval()(x)  # with gradients
        assert scope.nbytes == 0


def test_merging_is_noticed():
    x = normal(3, 41, **DOUBLE)
    layer = make_layer(41, 24, **DOUBLE).eval()
    layer.update_layer("other", r=3)
    randomize(layer)
    both = ["default", "other"]
    layer.set_adapter(both)
    expected = reference_forward(layer, x, both)
    with torch.no_grad(), randlora.inference_cache() as scope:
        for _ in range(2):
            call_until_kept(scope, layer, x)
            layer.merge(adapter_names=["other"])
            for _ in range(40):
                torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
            layer.merge(adapter_names=["default"])
            for _ in range(40):
                torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)
            layer.unmerge()
            torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("swap", [False, True])
def test_conversions_are_noticed(swap):
    """To 16 bits and back: lambda is another one then, often where the first one was, and its counter the same."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    x = normal(3, 41)
    try:
        with torch.no_grad(), randlora.inference_cache() as scope:
            for seed in range(10):
                layer = make_layer(41, 24).eval()
                randomize(layer, seed)
                call_until_kept(scope, layer, x)
                layer.to(torch.bfloat16).to(torch.float32)
                for _ in range(2):
                    assert relative_error(layer(x), reference_forward(layer, x)) < 1e-5
                    call_until_kept(scope, layer, x)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_memory_is_not_used_again():
    """Else numbers that were rounded on a way through 16 bits could lie where those before them did, uncounted."""
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    with torch.no_grad(), randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        before = [StorageWeakRef(p.untyped_storage()) for p in (*layer.randlora_gamma.values(), layer.weight)]
        layer.to(torch.bfloat16).to(torch.float32)
        assert not any(memory.expired() for memory in before)
        assert relative_error(layer(x), reference_forward(layer, x)) < 1e-5
    assert all(memory.expired() for memory in before)


def test_another_parameter_on_the_same_memory():
    """The counter of one does not show what was written through the other."""
    x = normal(3, 41, **DOUBLE)
    layer = make_layer(41, 24, **DOUBLE).eval()
    first = torch.nn.Parameter(layer.randlora_lambda["default"].data)
    second = torch.nn.Parameter(first.data)
    layer.randlora_lambda["default"] = first
    with torch.no_grad(), randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        assert first._version == second._version
        layer.randlora_lambda["default"] = second
        first.mul_(3)
        assert_exact(layer, x)


def test_inference_mode():
    """Inference tensors count no versions."""
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    expected = reference_forward(layer, x)
    with torch.inference_mode(), randlora.inference_cache() as scope:
        call_until_kept(scope, layer, x)
        assert relative_error(layer(x), expected) < 1e-5
        made_inside = make_layer(41, 24).eval()
        for _ in range(40):
            made_inside(x)
        assert scope.nbytes == 41 * 24 * 4
    layer.train()
    layer(x).sum().backward()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", ["set_adapter", "in place", "scaling", "bases", "autocast"])
def test_another_thread_changes_the_layer_while_one_builds(change, after, monkeypatch):
    x = normal(3, 41, **DOUBLE) if change != "autocast" else normal(3, 41)
    layer = make_layer(41, 24, dtype=x.dtype).eval()
    layer.update_layer("other", r=3)
    randomize(layer)
    changes = {
        "set_adapter": lambda: layer.set_adapter("other"),
        "in place": lambda: layer.randlora_lambda["default"].mul_(3),
        "scaling": lambda: layer.scaling.update(default=7.0),
        "bases": lambda: layer.bases.update(default=make_bases(41, 24, 5, seed=9)),
        "autocast": lambda: None,
    }

    @torch.no_grad()
    def change_and_call():
        changes[change]()
        with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"), randlora.inference_cache() as scope:
            call_until_kept(scope, layer, x)

    done = hold_up(layer, ("get_delta_weight",), monkeypatch, change_and_call, after)
    with torch.no_grad(), randlora.inference_cache():
        while not done:
            layer(x)
        for _ in range(40):
            expected = reference_forward(layer, x, layer.active_adapters)
            assert relative_error(layer(x), expected) < (1e-5 if change == "autocast" else 1e-10)
