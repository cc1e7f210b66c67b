"""Base weights that are trained, or that an engine has made to require gradients: PEFT's numbers, without a word."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.common import make_base, normal, over  # noqa: E402
from helpers.peft_models import both, config, conv1d, layers  # noqa: E402

import randlora  # noqa: E402

SHAPES = {"wide": (5, 11), "narrow": (11, 5)}


def gradients(model, x):
    x = x.detach().requires_grad_()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    y = model(x)
    found = torch.autograd.grad((y * torch.arange(1.0, 1 + y.shape[-1])).square().sum(), (x, *trained.values()))
    return dict(zip(["x", *trained], found, strict=True)), y


@pytest.mark.parametrize("which", ["weights", "everything", "conv1d"])
@over("dtype", (torch.float64, torch.float32))
def test_gradients_of_the_base(dtype, which, recwarn):
    base = conv1d(9, 6, dtype) if which == "conv1d" else layers(dtype, **SHAPES)
    arguments = {"fan_in_fan_out": True} if which == "conv1d" else {}
    targets = ["layer"] if which == "conv1d" else list(SHAPES)
    models = both(base, config(*targets, r=3, **arguments))
    x = normal(7, 9 if which == "conv1d" else 5, seed=1, dtype=dtype)
    recwarn.clear()
    for model in models:
        for name, parameter in model.named_parameters():
            if which != "weights" or name.endswith("base_layer.weight"):
                parameter.requires_grad_()
    (theirs, a), (ours, b) = (gradients(model, x) for model in models)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert theirs.keys() == ours.keys() and any("base_layer.weight" in name for name in theirs)
    for name, found in {**theirs, "y": a}.items():
        got = {**ours, "y": b}[name]
        torch.testing.assert_close(got / found.abs().max(), found / found.abs().max(), rtol=0, atol=tolerance)
    assert not recwarn.list


@pytest.mark.parametrize("shape", [(5, 11), (11, 5), (8, 8)], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized", "merged"])
def test_without_gradients_it_is_the_frozen_weight(shape, strategy):
    """The same bits: a call that records nothing does not depend on what could be trained, here and in PEFT."""
    bases = randlora.RandomBases(max(shape), min(shape), 3, seed=1)
    layer = randlora.Linear(make_base(*shape), bases=bases, r=3, strategy=strategy).eval()
    layer.randlora_lambda["default"].data.copy_(normal(*layer.randlora_lambda["default"].shape, seed=2))
    (_, ours) = both(layers(layer=shape), config("layer", r=3))
    adapted = ours.base_model.model.layer
    adapted.strategy = strategy
    x = normal(7, shape[0], seed=3)
    for module in (layer, adapted):
        with torch.no_grad():
            expected = module(x)
            module.get_base_layer().requires_grad_(True)
            assert torch.equal(module(x), expected)
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_in_fsdp(recwarn):
    """Its flat parameter makes all weights require gradients where one does, and they are views of it in a call."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("needs torch.distributed with gloo")
    fsdp = pytest.importorskip("torch.distributed.fsdp").FullyShardedDataParallel
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        for bias in ("none", "all", "randlora_only"):
            models = both(layers(**SHAPES), config(*SHAPES, r=3, bias=bias))
            x, device = normal(7, 5, seed=1), torch.device("cpu")
            wrapped = [fsdp(copy.deepcopy(m).eval(), use_orig_params=True, device_id=device) for m in models]
            with torch.no_grad():
                assert torch.equal(wrapped[1](x), models[1].eval()(x))
                torch.testing.assert_close(wrapped[1](x), wrapped[0](x), rtol=1e-4, atol=1e-4)
            for model in wrapped:
                model(x).square().sum().backward()
            (theirs, ours) = ({n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in wrapped)
            assert theirs.keys() == ours.keys() and len(ours) == 4 + 2 * (bias != "none")
            for name, grad in theirs.items():
                torch.testing.assert_close(ours[name] / grad.norm(), grad / grad.norm(), rtol=0, atol=1e-4)
    finally:
        distributed.destroy_process_group()
