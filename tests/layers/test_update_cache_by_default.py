"""Without a scope nothing is kept between calls: no way to write to a parameter, from wherever, is missed."""

import gc
import weakref

import pytest
import torch
from helpers.cache_cases import assert_exact, hold_up
from helpers.common import make_bases, make_layer, normal, randomize, reference_forward

DOUBLE = dict(dtype=torch.float64)


def called_twice(x, **arguments):
    """A layer in eval mode, as an evaluation before the change leaves it."""
    layer = make_layer(x.shape[-1], 24, **arguments).eval()
    with torch.no_grad():
        layer(x), layer(x)
    return layer


@pytest.mark.parametrize("name", ["lambda", "gamma", "weight"])
@pytest.mark.parametrize("write", ["mul", "copy", "lerp", "numpy", "detached"])
def test_writes_that_move_no_version_counter(write, name):
    """Mean teachers (EMA) write through ``.data``."""
    x = normal(3, 41, **DOUBLE)
    layer = called_twice(x, **DOUBLE)
    parameter = layer.weight if name == "weight" else getattr(layer, f"randlora_{name}")["default"]
    version = parameter._version
    new = 3 * parameter.detach()
    {
        "mul": lambda: parameter.data.mul_(3),
        "copy": lambda: parameter.data.copy_(new),
        "lerp": lambda: parameter.data.lerp_(new, 0.999),
        "numpy": lambda: parameter.detach().numpy().__imul__(3),
        "detached": lambda: torch.from_numpy(parameter.detach().numpy()).mul_(3),
    }[write]()
    assert parameter._version == version, "this test is about writes that a version counter does not show"
    assert_exact(layer, x)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad])
def test_fused_optimizers_that_step_in_eval_mode(optimizer):
    x = normal(3, 41, **DOUBLE)
    layer = called_twice(x, **DOUBLE)
    optimizer = optimizer([p for p in layer.parameters() if p.requires_grad], lr=0.1, fused=True)
    layer(x).sum().backward()
    with torch.no_grad():
        layer(x), layer(x)
    optimizer.step()
    assert_exact(layer, x)


def _triple(tensors):
    for tensor in tensors:
        tensor.mul_(3)


def test_writes_of_another_process():
    x = normal(3, 41, **DOUBLE)
    layer = make_layer(41, 24, **DOUBLE).eval().share_memory()
    with torch.no_grad():
        layer(x), layer(x)
    before = layer.randlora_lambda["default"].detach().clone()
    # As tensors: a child that was started anew need not import any of this.
    process = torch.multiprocessing.get_context("spawn").Process(
        target=_triple, args=([layer.randlora_lambda["default"].detach()],)
    )
    process.start()
    process.join()
    assert process.exitcode == 0 and torch.equal(layer.randlora_lambda["default"], 3 * before)
    assert_exact(layer, x)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("change", ["set_adapter", "in place", "scaling", "bases", "another of the same name"])
def test_another_thread_changes_the_layer_meanwhile(change, after, monkeypatch):
    """Whatever the call in progress gives, those after it are right."""
    x = normal(3, 41, **DOUBLE)
    layer = make_layer(41, 24, **DOUBLE).eval()
    layer.update_layer("other", r=3)
    randomize(layer)

    def another():
        bases, r = layer.bases["default"], layer.r["default"]
        layer.set_adapter("other")
        layer.delete_adapter("default")
        layer.update_layer("default", r=r, bases=bases)
        layer.randlora_lambda["default"].fill_(1.0)
        layer.set_adapter("default")

    changes = {
        "set_adapter": lambda: layer.set_adapter("other"),
        "in place": lambda: layer.randlora_lambda["default"].mul_(3),
        "scaling": lambda: layer.scaling.update(default=7.0),
        "bases": lambda: layer.bases.update(default=make_bases(41, 24, 5, seed=9)),
        "another of the same name": another,
    }

    @torch.no_grad()
    def change_and_call():
        changes[change]()
        layer(x)

    with torch.no_grad():
        layer(x)
        done = hold_up(layer, ("get_delta_weight", "_update"), monkeypatch, change_and_call, after)
        layer(x)
    assert done
    assert_exact(layer, x, layer.active_adapters)


def test_a_thread_under_autocast_beside_one_in_fp32(monkeypatch):
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()

    @torch.no_grad()
    def under_autocast():
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
            return layer(x).float()

    expected = reference_forward(layer, x)
    scale = expected.abs().max()
    with torch.no_grad():
        layer(x)
        done = hold_up(layer, ("get_delta_weight", "_update"), monkeypatch, under_autocast)
        layer(x)
        assert done
        for _ in range(3):
            assert (under_autocast() - expected).abs().max() / scale < 0.03
            assert (layer(x) - expected).abs().max() / scale < 1e-5


def test_no_tensor_stays_behind():
    """Nor a weak reference, which torch.utils.swap_tensors refuses."""
    x = normal(3, 41)
    layer = make_layer(41, 24).eval()
    with torch.no_grad():
        layer(x)
    del x
    gc.collect()

    def tensors():
        return {id(t) for t in gc.get_objects() if issubclass(type(t), torch.Tensor)}

    before = tensors()
    x = normal(3, 41)
    with torch.no_grad():
        layer(x), layer(x), layer(x)
    del x
    gc.collect()
    assert tensors() <= before
    assert not any(weakref.getweakrefs(p) for p in layer.parameters())


@pytest.fixture
def swapping():
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(before)


def test_conversions_that_swap_parameters(swapping):
    x = normal(3, 41, **DOUBLE)
    layer = called_twice(x, **DOUBLE)
    layer.to(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(layer(x.float()), reference_forward(layer, x).float(), rtol=1e-4, atol=1e-4)
    assert_exact(layer.to(torch.float64), x)
