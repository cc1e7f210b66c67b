"""randlora.Experts on a GPU: what it gives on the CPU, unmerged and merged; and the products of all experts at once."""

import pytest
import torch
from helpers.common import KINDS
from helpers.experts_cases import adapt, experts_of, families, inputs, own, parameters_of, reference
from helpers.experts_grouped_cases import in_turn

from randlora.layers import experts_choice, experts_grouped

pytestmark = pytest.mark.cuda

DEVICE, TOP_K = "cuda", 2


def computed(family, kind, device):
    """The output, the gradients, and the output of the merged module, which computes by itself."""
    layer = adapt(experts_of(family, torch.float32), kind=kind).to(device)
    hidden, ids, weights = (tensor.detach().to(device) for tensor in inputs(TOP_K, dtype=torch.float32))
    wanted = [hidden.requires_grad_(), weights.requires_grad_(), *parameters_of(layer)]
    y = layer(hidden, ids, weights)
    found = [y, *torch.autograd.grad(y.square().sum(), wanted)]
    for part in layer.adapted():
        part.merge()
    return [*found, layer(hidden, ids, weights)]


@families
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_computes_what_the_cpu_does(family, kind):
    expected, got = (computed(family, kind, device) for device in ("cpu", DEVICE))
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-4, atol=1e-4 * a.abs().max().item())


# ---- all experts at once ----


@pytest.fixture
def seen(monkeypatch):
    """The calls that were computed so: all that can be."""
    found, linear = [], experts_grouped.linear
    monkeypatch.setattr(experts_choice, "DEVICES", (DEVICE,))
    monkeypatch.setattr(experts_choice, "HOST", (10**18, 10**18))
    monkeypatch.setattr(experts_choice, "LAUNCHES", 0)
    monkeypatch.setattr(experts_grouped, "linear", lambda *given: found.append(given) or linear(*given))
    return found


E = 12
FORMS = {
    "wide, then wide": {"has_gate": True, "hidden": 128, "inner": 72},
    "tall, then wide": {"has_gate": True, "hidden": 256, "inner": 72},
    "wide, then tall": {"hidden": 64, "inner": 200},
    "transposed, bias": {"has_gate": True, "is_transposed": True, "has_bias": True, "hidden": 128, "inner": 40},
}
ROUTINGS = {"all": range(E), "some": [0, 3, 4, 7, 11], "one": [6]}


def step(layer, arguments, call):
    """The output, and the gradients of the tokens, of their weights and of all trained parameters."""
    y = call(layer, arguments)
    wanted = [arguments[0], arguments[2], *parameters_of(layer)]
    return [t.cpu().double() for t in (y, *torch.autograd.grad(y.square().sum(), wanted))]


def errors(layer, arguments):
    """Of all of a step against float64."""
    exact = tuple(t.detach().double().requires_grad_() if t.is_floating_point() else t for t in arguments)
    true = step(layer, exact, reference)
    found = step(layer, arguments, lambda layer, given: layer(*given))
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True)]


def routed_to(known, hidden, tokens):
    """Tokens that go to these experts, by random."""
    generator = torch.Generator().manual_seed(5)
    x, weights = (torch.randn(tokens, size, generator=generator).to(DEVICE, torch.bfloat16) for size in (hidden, TOP_K))
    ids = torch.tensor(list(known))[torch.randint(len(known), (tokens, TOP_K), generator=generator)]
    return x.requires_grad_(), ids.to(DEVICE), weights.requires_grad_()


def alone(layer, arguments):
    """The errors of a step that goes expert by expert."""
    with in_turn():
        return errors(layer, arguments)


def assert_no_worse(together, alone, kind="dense"):
    """As exact, up to chance, as dense products expert by expert. Those of other kinds round less often."""
    allowed = 1.5 if kind == "dense" else 4
    assert all(a < max(allowed * b, 0.005) for a, b in zip(together, alone, strict=True)), (together, alone)
    assert max(alone) < 0.06


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_experts_at_once(kind, form, routing, seen, monkeypatch):
    """Groups of any number of rows, experts without any, all of them in one piece and one by one."""
    layer = adapt(own(torch.bfloat16, num_experts=E, **FORMS[form]), kind=kind, r=8).to(DEVICE)
    arguments = routed_to(ROUTINGS[routing], FORMS[form]["hidden"], tokens=301)
    for room in (1 << 29, 1):
        monkeypatch.setattr(experts_choice, "WORKSPACE", room)
        seen.clear()
        together = errors(layer, arguments)
        assert len(seen) == 2
        assert_no_worse(together, alone(layer, arguments), kind)
        assert len(seen) == 2


def test_it_is_what_experts_with_few_tokens_get(monkeypatch):
    """Without being told to: 64 experts, 8 tokens each."""
    layer = adapt(own(torch.bfloat16, num_experts=64, hidden=256, inner=128, has_gate=True), r=8).to(DEVICE)
    called, linear = [], experts_grouped.linear
    monkeypatch.setattr(experts_grouped, "linear", lambda *given: called.append(given) or linear(*given))
    arguments = routed_to(range(64), 256, tokens=256)
    together = errors(layer, arguments)
    assert len(called) == 2
    assert_no_worse(together, alone(layer, arguments))


def test_a_step_waits_for_the_device_once(seen):
    """For the numbers of tokens; what the numbers of tokens are needed for does not wait again."""
    layer = adapt(own(torch.bfloat16, num_experts=E, hidden=128, inner=72, has_gate=True), r=8).to(DEVICE)
    hidden, ids, weights = routed_to(range(E), 128, tokens=64)
    layer(hidden, ids, weights).sum().backward()
    counts = [int(count) for count in ids.flatten().bincount(minlength=E).tolist()]
    x = hidden.detach()[:1].expand(sum(counts), -1).contiguous().requires_grad_()
    part = layer.adapted()[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        part(x, counts, part.weight, None).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 3
