"""A whole training step on every device: each kind, strategy and dtype; nothing read back; two models side by side."""

import pytest
import torch
from helpers.common import FLOATS, KINDS, make_layer, normal, on_devices, over, reference_dW
from helpers.training import bases_of, make_network, trained
from torch import nn

STRATEGIES = ("auto", "factored", "materialized", "merged")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the norm
# Ops that make the host wait for the device, or would on CUDA.
READING_BACK = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@over("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(41, 64), (64, 24)], ids=str)
def test_every_kind_strategy_and_dtype(kind, strategy, dtype, shape, device):
    layer = make_layer(*shape, 8, dtype=dtype, device=device, bases=bases_of(kind), strategy=strategy)
    x = normal(2, 9, shape[0], dtype=dtype, device=device).requires_grad_()
    lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    y = layer(x)
    g = normal(*y.shape, seed=9, dtype=dtype, device=device)

    inputs = [t.detach().double().requires_grad_() for t in (x, lam, gamma)]
    bases = layer.bases["default"].to(torch.float64)
    A, B = bases.A.to(device), bases.B.to(device)
    dW = reference_dW(A, B, *inputs[1:], layer.scaling["default"], *shape)
    exact = nn.functional.linear(inputs[0], layer.weight.double() + dW, layer.bias.double())
    pairs = zip(
        (y, *torch.autograd.grad(y, (x, lam, gamma), g)), (exact, *torch.autograd.grad(exact, inputs, g.double())),
        strict=True,
    )  # fmt: skip
    for got, true in pairs:
        assert ((got.double() - true).norm() / true.norm()).item() < TOLERANCE[dtype]


@on_devices
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_training_step_reads_nothing_back(kind, strategy, device):
    """From the second step on; the first one makes the bases."""
    dropout = 0.0 if strategy == "merged" else 0.1
    network = make_network(bases_of(kind), device, strategy=strategy, randlora_dropout=dropout)
    x = normal(50, 41, device=device).requires_grad_()

    def ops(function):
        function()
        with torch.profiler.profile() as trace:
            function()
        return {event.name for event in trace.events()}

    assert READING_BACK & ops(lambda: x.sum().item())
    found = ops(lambda: network(x).square().mean().backward())
    assert any(name.startswith("randlora::linear") for name in found)
    assert not READING_BACK & found


@on_devices
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["nodropout", "dropout"])
def test_two_models_on_one_device(dropout, device):
    """Steps of two models in turn give each the numbers that it gets alone, though they share their bases."""
    store = bases_of("dense")

    def train(seeds):
        networks = {seed: make_network(store, device, randlora_dropout=dropout) for seed in seeds}
        optimizers = {seed: torch.optim.SGD(trained(network), 1e-6) for seed, network in networks.items()}
        for step in range(3):
            for seed, network in networks.items():
                torch.manual_seed(100 * seed + step)  # of the dropout masks
                network(normal(20, 41, seed=seed, device=device)).square().mean().backward()
                optimizers[seed].step()
                optimizers[seed].zero_grad()
        return {seed: [p.detach().clone() for p in trained(network)] for seed, network in networks.items()}

    together = train((1, 2))
    assert all(a.isfinite().all() and not torch.equal(a, b) for a, b in zip(together[1], together[2], strict=True))
    for seed in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(together[seed], train((seed,))[seed], strict=True))


@on_devices
@pytest.mark.parametrize("kind", ["dense", "very_sparse"])
def test_autocast(kind, device):
    """fp32 weights under bf16 autocast: forward and all gradients as close as 16 bits allow, gradients in fp32."""
    network, x = make_network(bases_of(kind), device), normal(50, 41, device=device).requires_grad_()
    tensors = [x, *trained(network)]
    exact = torch.autograd.grad(network(x).square().mean(), tensors)
    with torch.autocast(device, torch.bfloat16):
        y = network(x)
        loss = y.float().square().mean()
    assert y.dtype == torch.bfloat16
    for got, true in zip(torch.autograd.grad(loss, tensors), exact, strict=True):
        assert got.dtype == torch.float32
        assert ((got - true).norm() / true.norm()).item() < 3e-2
