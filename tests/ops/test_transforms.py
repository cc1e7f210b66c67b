"""The layer under torch.compile, torch.func, several devices and CUDA graphs."""

import pytest
import torch
from helpers.common import KINDS, make_bases, make_layer, normal, on_devices, reference_forward
from torch.func import functional_call, grad, vmap


def trained(layer):
    return [p for p in layer.parameters() if p.requires_grad]


@on_devices
@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized", "merged"])
def test_compile_fullgraph_dynamic(strategy, device):
    torch._dynamo.reset()
    layer = make_layer(41, 24, dtype=torch.float64, device=device, strategy=strategy)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for tokens in (3, 7, 500):
        x = normal(2, tokens, 41, dtype=torch.float64, device=device).requires_grad_()
        y = compiled(x)
        torch.testing.assert_close(y, reference_forward(layer, x), rtol=1e-10, atol=1e-10)
        got = torch.autograd.grad(y.sum(), (x, *trained(layer)))
        expected = torch.autograd.grad(layer(x).sum(), (x, *trained(layer)))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@on_devices
def test_compiled_dropout_draws_one_mask(device):
    """The update is linear in x, so <g, y> = <dx, x> holds only if forward and backward draw the same mask."""
    torch._dynamo.reset()
    layer = make_layer(41, 24, bias=False, dtype=torch.float64, device=device, randlora_dropout=0.5)
    x = normal(6, 41, dtype=torch.float64, device=device).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    y, g = compiled(x), normal(6, 24, seed=3, dtype=torch.float64, device=device)
    (dx,) = torch.autograd.grad(y, x, g)
    torch.testing.assert_close((dx * x).sum(), (g * y).sum(), rtol=1e-12, atol=1e-12)
    assert not torch.equal(compiled(x), y)


@on_devices
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_asks_a_store_for_several_things(kind, device):
    """In two dtypes, and for lists of two sizes: they are made while the graph is traced, and are no part of it."""
    torch._dynamo.reset()
    graphs, bases = [], make_bases(130, 110, 8, kind=kind)
    a, b, c = (make_layer(*shape, 8, bases=bases, device=device) for shape in ((130, 104), (104, 110), (110, 120)))

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def use(x):
        y = b(a(x))
        with torch.autocast(device, torch.bfloat16):
            return c(y)

    x = normal(3, 130, device=device)
    compiled = torch.compile(use, fullgraph=True, backend=backend)
    assert torch.equal(compiled(x), use(x)) and torch.equal(compiled(x), use(x))
    assert len(graphs) == 1 and "slice" not in graphs[0].code


@on_devices
def test_compile_with_bases_that_are_looked_at_in_vain(device):
    """Tensors that might have been ternary."""
    torch._dynamo.reset()
    A, B = normal(5, 1, 24, device=device), normal(41, 5, 5, seed=1, device=device)
    layer = make_layer(41, 24, randlora_A=A, randlora_B=B, device=device)
    x = normal(3, 41, device=device)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


@on_devices
@pytest.mark.parametrize("strategy", ["factored", "materialized", "merged"])
def test_per_sample_gradients(strategy, device):
    layer = make_layer(41, 24, dtype=torch.float64, device=device, strategy=strategy)
    parameters = {name: p for name, p in layer.named_parameters() if "randlora" in name}
    x = normal(4, 3, 41, dtype=torch.float64, device=device)

    def loss(parameters, x):
        return functional_call(layer, parameters, (x,)).pow(2).sum()

    got = vmap(grad(loss), in_dims=(None, 0))({k: p.detach() for k, p in parameters.items()}, x)
    for sample in range(4):
        expected = torch.autograd.grad(loss(parameters, x[sample]), list(parameters.values()))
        for name, value in zip(parameters, expected, strict=True):
            torch.testing.assert_close(got[name][sample], value, rtol=1e-10, atol=1e-10)


@on_devices
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap_over_data(axis, device):
    layer = make_layer(41, 24, dtype=torch.float64, device=device)
    x = normal(5, 6, 41, dtype=torch.float64, device=device)
    batched = x.movedim(0, axis)
    torch.testing.assert_close(vmap(layer, in_dims=axis)(batched), layer(x), rtol=1e-12, atol=1e-12)


@on_devices
def test_vmap_over_parameters(device):
    """An ensemble: one input, several lambdas."""
    layer = make_layer(41, 24, dtype=torch.float64, device=device)
    lam = layer.randlora_lambda["default"].detach()
    many = torch.stack([lam, 2 * lam, -lam])
    x = normal(5, 41, dtype=torch.float64, device=device)
    got = vmap(lambda p: functional_call(layer, {"randlora_lambda.default": p}, (x,)))(many)
    for p, y in zip(many, got, strict=True):
        expected = functional_call(layer, {"randlora_lambda.default": p}, (x,))
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@on_devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_the_dtype_of_linear(dtype, device):
    layer = make_layer(41, 24, device=device)
    x = normal(7, 41, device=device).requires_grad_()
    with torch.autocast(device, dtype):
        y, plain = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert y.dtype == plain.dtype == dtype
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in trained(layer))
    scale = reference_forward(layer, x).abs().max()
    torch.testing.assert_close(y.double() / scale, reference_forward(layer, x) / scale, rtol=0.05, atol=0.02)


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_cuda_graph_replays_with_new_inputs_and_new_masks(dropout):
    layer = make_layer(64, 96, device="cuda", randlora_dropout=dropout)
    x = normal(50, 64, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            layer(x).sum().backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    layer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        y = layer(x)
        y.sum().backward()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert torch.equal(y, first) == (dropout == 0.0)
    x.mul_(2)
    graph.replay()
    if not dropout:
        torch.testing.assert_close(y, layer(x))


@pytest.mark.cuda
def test_several_devices_in_one_model():
    host, device = make_layer(41, 24), make_layer(41, 24, device="cuda")
    x = normal(7, 41)
    torch.testing.assert_close(device(x.cuda()).cpu(), host(x), rtol=1e-3, atol=1e-2)
    bases = host.bases["default"]
    assert bases.tensors(torch.float32, torch.device("cpu"))[0].device.type == "cpu"
