"""What only a GPU can show: bits equal to the CPU's, side streams, graphs, no synchronisation, large sizes.

The other modules' tests run on CUDA too: `pytest -m cuda`.
"""

import pytest
import torch
from common import FLOATS, KINDS, draw_factors, make_bases, make_layer, normal, over

import randlora
from randlora.functional import unique_base

pytestmark = pytest.mark.cuda
_ops = torch.ops.randlora


@pytest.mark.parametrize("kind", KINDS)
@over("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(96, 64, 8), (341, 41, 5), (1, 1, 1), (1000, 333, 33)], ids=str)
def test_bases_have_the_bits_of_the_cpu(kind, dtype, shape):
    bases = make_bases(*shape, kind=kind, seed=2**40 + 3)
    for host, device in zip(
        bases.tensors(dtype, torch.device("cpu")), bases.tensors(dtype, torch.device("cuda")), strict=True
    ):
        assert torch.equal(host, device.cpu())
    assert bases.to("cuda").fingerprint() == bases.fingerprint()


@pytest.mark.parametrize("offsets", [(0, 0, 0), (3, 2, 1), (7, 5, 6), (2**31 - 40, 2**31 - 40, 2**31 - 40)], ids=str)
@pytest.mark.parametrize("sparsity", [None, 3.0])
def test_slices_have_the_bits_of_the_cpu(offsets, sparsity):
    host = torch.empty(9, 8, 13)
    device = torch.empty(9, 9, 16, device="cuda")[:, :8, :13]
    for out in (host, device):
        _ops.fill_bases_(out, 5, 1, offsets, sparsity)
    assert torch.equal(host, device.cpu())


def test_forward_and_mask_have_the_bits_of_the_cpu():
    A, lam, gamma = draw_factors(32, 11, 341)
    assert torch.equal(unique_base(A.cuda(), lam.cuda(), gamma.cuda(), 0.7).cpu(), unique_base(A, lam, gamma, 0.7))
    x, seed = normal(37, 341), torch.tensor([2**50 + 1])
    assert torch.equal(_ops.dropout(x.cuda(), seed.cuda(), 0.3).cpu(), _ops.dropout(x, seed, 0.3))


def test_side_stream():
    A, lam, gamma = draw_factors(32, 64, 2048, device="cuda")
    G = normal(32, 64, 2048, seed=7, device="cuda")
    expected = unique_base(A, lam, gamma), *_ops.unique_base_backward(G, A, lam, gamma)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10**7)
        late = lam * 1  # ready only when the side stream gets there
        got = unique_base(A, late, gamma), *_ops.unique_base_backward(G, A, late, gamma)
    torch.cuda.current_stream().wait_stream(side)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_graph_of_unique_base():
    A, lam, gamma = draw_factors(32, 11, 341, device="cuda")
    G = normal(32, 11, 341, seed=7, device="cuda")
    unique_base(A, lam, gamma), _ops.unique_base_backward(G, A, lam, gamma)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = unique_base(A, lam, gamma), *_ops.unique_base_backward(G, A, lam, gamma)
    lam.mul_(2)
    graph.replay()
    expected = unique_base(A, lam, gamma), *_ops.unique_base_backward(G, A, lam, gamma)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("strategy", ["factored", "materialized", "merged"])
@over("dtype", (torch.float32, torch.bfloat16))
def test_a_training_step_never_synchronises(strategy, dtype):
    dropout = 0.0 if strategy == "merged" else 0.1
    layer = make_layer(64, 96, 8, dtype=dtype, device="cuda", strategy=strategy, randlora_dropout=dropout)
    x = normal(50, 64, dtype=dtype, device="cuda").requires_grad_()
    layer(x).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_than_two_to_the_31_elements():
    r, n, m = 32, 2**13 + 1, 2**13
    if torch.cuda.mem_get_info()[0] < 2.5 * 2 * r * n * m:
        pytest.skip("too little GPU memory")
    A, lam, gamma = draw_factors(r, n, m, torch.bfloat16, torch.float32, "cuda")
    S = unique_base(A, lam, gamma, dtype=torch.bfloat16)
    assert S.numel() > 2**31
    last = (lam[-1:, -1:, None] * A[-1:].float() * gamma[-1:]).to(torch.bfloat16)
    assert torch.equal(S[-1:, -1:], last)
    dlam, dgamma = _ops.unique_base_backward(S, A, lam, gamma)
    exact = (S[-1, -1].double() * A[-1, 0].double() * gamma[-1].double()).sum()
    torch.testing.assert_close(dlam[-1, -1].double(), exact, rtol=1e-4, atol=1e-4)
    assert dgamma.isfinite().all()
    del S
    out = torch.empty(2**31 // 2**13 + 1, 1, 2**13, dtype=torch.int8, device="cuda")
    _ops.fill_bases_(out, 1, 1, (0, 0, 0), 3.0)
    tail = torch.empty(1, 1, 2**13, dtype=torch.int8)
    _ops.fill_bases_(tail, 1, 1, (out.shape[0] - 1, 0, 0), 3.0)
    assert torch.equal(out[-1:].cpu(), tail)


def test_one_store_serves_both_devices():
    layer = randlora.Linear(torch.nn.Linear(64, 96), r=8)
    bases = layer.bases["default"]
    layer.cuda()(normal(3, 64, device="cuda"))
    assert bases.tensors(torch.float32, torch.device("cuda"))[0].device.type == "cuda"
