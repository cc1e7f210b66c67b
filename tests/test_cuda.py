"""What only a GPU can show: bits equal to the CPU's, side streams, graphs, no synchronisation, large sizes.

The other modules' tests run on CUDA too: `pytest -m cuda`.
"""

import pytest
import torch
from helpers.common import FLOATS, KINDS, draw_factors, make_bases, normal, over
from helpers.dropout import reference_mask
from helpers.training import bases_of, make_network, trained

import randlora
from randlora.bases.patterns import StoredBits
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


@pytest.mark.parametrize("kind", KINDS)
def test_bases_made_on_a_side_stream_serve_every_stream(kind):
    expected = make_network(bases_of(kind), "cuda")(normal(50, 41, device="cuda"))
    network, x = make_network(bases_of(kind), "cuda"), normal(50, 41, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(10**8)
        network(x)
    assert torch.equal(network(x), expected)  # no event between the streams


def _train(network, optimizer, x):
    optimizer.zero_grad(set_to_none=False)
    loss = network(x).float().square().mean()
    loss.backward()
    optimizer.step()
    return loss


def _for_training(kind, **arguments):
    network = make_network(bases_of(kind), "cuda", **arguments)
    return network, torch.optim.AdamW(trained(network), 1e-4, capturable=True)


def _capture(network, optimizer, x):
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            _train(network, optimizer, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = _train(network, optimizer, x)
    return graph, loss


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized", "merged"])
@over("dtype", (torch.float32, torch.bfloat16))
def test_graph_of_a_training_step(kind, strategy, dtype):
    """Forward, backward and optimizer, replayed, train as the same steps do one by one."""
    losses = []
    for captured in (True, False):
        network, optimizer = _for_training(kind, strategy=strategy, dtype=dtype)
        x = normal(50, 41, dtype=dtype, device="cuda")
        if captured:
            graph, loss = _capture(network, optimizer, x)
            losses.append([(x.copy_(normal(50, 41, seed=seed)), graph.replay(), loss.item())[2] for seed in range(4)])
        else:
            for _ in range(3):
                _train(network, optimizer, x)
            batches = [normal(50, 41, seed=seed, dtype=dtype, device="cuda") for seed in range(4)]
            losses.append([_train(network, optimizer, batch).item() for batch in batches])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert len(set(losses[0])) == 4


def test_every_replay_draws_a_new_mask():
    network, optimizer = _for_training("dense", randlora_dropout=0.5)
    optimizer.param_groups[0]["lr"] = 0.0
    graph, loss = _capture(network, optimizer, normal(50, 41, device="cuda"))
    assert len({(graph.replay(), loss.item())[1] for _ in range(3)}) == 3


@pytest.mark.parametrize("kind", ["dense", "very_sparse"])
def test_capture_before_the_first_call_says_what_to_do(kind):
    network, x = make_network(bases_of(kind), "cuda"), normal(50, 41, device="cuda")
    with pytest.raises(RuntimeError, match="call the model once before"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        network(x)
    torch.cuda.synchronize()
    network(x)


@pytest.mark.parametrize("kind", ["dense", "very_sparse"])
def test_compiled_training_step(kind):
    torch._dynamo.reset()
    network, x = make_network(bases_of(kind), "cuda"), normal(50, 41, device="cuda").requires_grad_()
    tensors = [x, *trained(network)]
    expected = torch.autograd.grad(network(x).square().mean(), tensors)
    compiled = torch.compile(network, fullgraph=True)
    for got, true in zip(torch.autograd.grad(compiled(x).square().mean(), tensors), expected, strict=True):
        assert ((got - true).norm() / true.norm()).item() < 1e-5


# Runtime calls in which the host waits, as a trace names them. The plain memory functions do so too.
_WAITING = ("Synchronize", "cudaMemcpy2D", "cudaFree", "cudaMalloc")


def _waits_of(step):
    """Names of the CUDA calls within `step` in which the host waits for the device."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        with torch.profiler.record_function("the step"):  # ending the profile synchronises
            step()
        torch.cuda.synchronize()
    events = trace.events()
    (span,) = (e.time_range for e in events if e.name == "the step" and e.device_type == torch.autograd.DeviceType.CPU)
    inside = [e.name for e in events if span.start <= e.time_range.start and e.time_range.end <= span.end]
    assert any("LaunchKernel" in name for name in inside), "the trace has no CUDA calls"
    return {name for name in inside if name == "cudaMemcpy" or any(part in name for part in _WAITING)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strategy", ["factored", "materialized", "merged"])
@over("dtype", (torch.float32, torch.bfloat16))
def test_a_training_step_never_synchronises(kind, strategy, dtype):
    dropout = 0.0 if strategy == "merged" else 0.1
    network, optimizer = _for_training(kind, strategy=strategy, dtype=dtype, randlora_dropout=dropout)
    x = normal(50, 41, dtype=dtype, device="cuda").requires_grad_()
    for _ in range(2):  # the first makes bases, the second finds memory and cuBLAS's workspace in place
        _train(network, optimizer, x)
        with torch.autocast("cuda", torch.bfloat16):  # has bases of its own
            _train(network, optimizer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _train(network, optimizer, x)
        with torch.autocast("cuda", torch.bfloat16):
            _train(network, optimizer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert _waits_of(lambda: x.sum().item())
    assert not _waits_of(lambda: _train(network, optimizer, x))


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


def test_dropout_of_more_than_two_to_the_31_elements():
    size = 2**31 + 2**16 + 8
    if torch.cuda.mem_get_info()[0] < 5 * size:
        pytest.skip("too little GPU memory")
    x, seed = torch.ones(size, dtype=torch.bfloat16, device="cuda"), 2**50 + 1
    got = _ops.dropout(x, torch.tensor([seed], device="cuda"), 0.3)
    for begin in (2**31 - 64, 2**31, size - 64):
        keep = reference_mask(64, seed, 0.3, first=begin)
        assert torch.equal(got[begin : begin + 64].cpu() != 0, keep)


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows", "columns"])
def test_sparse_update_of_more_than_two_to_the_31_elements(by_rows):
    m, M = 2**15 + 8, 2**16
    if torch.cuda.mem_get_info()[0] < 5 * m * M:
        pytest.skip("too little GPU memory")
    A, B = torch.zeros(1, m, dtype=torch.int8), torch.zeros(M, 1, dtype=torch.int8)
    A[0, 0], A[0, m - 1], B[5, 0], B[M - 1, 0] = 1, -1, 1, -1
    pattern = list(StoredBits(A.cuda(), iter([B.cuda()]), M).of(m))
    lam, gamma = torch.full((1, 1), 2.0, device="cuda"), torch.ones(1, m, device="cuda")
    shape = (m, M) if by_rows else (M, m)
    weight = torch.ones(shape, dtype=torch.bfloat16, device="cuda")
    weight = weight if by_rows else weight.t()
    got = _ops.sparse_update(pattern, lam, gamma, M, 1.0, weight, torch.bfloat16)
    assert got.numel() > 2**31 and got.stride() == weight.stride()
    changed = {(0, 5): 3, (0, M - 1): -1, (m - 1, 5): -1, (m - 1, M - 1): 3}
    for (j, o), value in changed.items():
        assert got[j, o].item() == value
    assert int((got != 1).sum()) == len(changed)


def test_one_store_serves_both_devices():
    layer = randlora.Linear(torch.nn.Linear(64, 96), r=8)
    bases = layer.bases["default"]
    layer.cuda()(normal(3, 64, device="cuda"))
    assert bases.tensors(torch.float32, torch.device("cuda"))[0].device.type == "cuda"
