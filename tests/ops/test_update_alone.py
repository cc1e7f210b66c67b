"""The update without a base weight, where dropout lies between it and its input: op by op, and how layers get there."""

import itertools

import pytest
import torch
from helpers.common import FORMS, KINDS, normal, on_devices, over, reference_dW
from torch import nn

import randlora
from randlora.functional import linear

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.1}


@on_devices
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(17, 40), (40, 17), (1, 3), (3, 1), (1, 1), (24, 24)], ids=str)
@pytest.mark.parametrize("strategy", ["auto", "factored", "materialized"])
@over("dtype", TOLERANCE)
def test_every_gradient_through_dropout(form, shape, strategy, dtype, device):
    (i, o), r = shape, 4
    m, M = min(shape), max(shape)
    bases = randlora.RandomBases(M + 3, m + 2, r, seed=1, **FORMS[form])
    n = bases.num_bases
    found = bases.pattern(m, torch.device(device))
    A, B = (None, None) if found else bases.draw(dtype, torch.device(device))
    parameters = torch.float64 if dtype == torch.float64 else torch.float32
    values = (
        normal(2, 7, i, dtype=dtype),
        normal(r, n, seed=2, dtype=parameters),
        normal(n, m, seed=3, dtype=parameters),
    )
    weight, g, seed = normal(o, i, seed=4, dtype=dtype), normal(2, 7, o, seed=5, dtype=dtype), torch.tensor([5])
    weight, g, seed, *values = (t.to(device) for t in (weight, g, seed, *values))
    mask = torch.ops.randlora.dropout(torch.ones_like(values[0], dtype=torch.float64), seed, 0.4)
    dense = bases.draw(torch.float64, torch.device(device))
    for w, p, needs in itertools.product((None, weight), (0.4, 0.0), itertools.product((True, False), repeat=3)):
        x, lam, gamma = (t.clone().requires_grad_(need) for t, need in zip(values, needs, strict=True))
        y = linear(x, w, None, A, B, lam, gamma, 0.7 * bases.scale, p, strategy=strategy, out_features=o, seed=seed,
                   pattern=found and found[0])  # fmt: skip
        exact = [t.to(torch.float64, copy=True).requires_grad_() for t in values]
        update = reference_dW(*dense, *exact[1:], 0.7 * bases.scale, i, o)
        expected = nn.functional.linear(exact[0] * mask if p else exact[0], update)
        if w is not None:
            expected = expected + nn.functional.linear(exact[0], w.double())
        wanted = torch.autograd.grad(expected, exact, g.double())
        got = [t for t, need in zip((x, lam, gamma), needs, strict=True) if need]
        got = iter(torch.autograd.grad(y, got, g)) if got else iter(())
        assert y.dtype == dtype and y.requires_grad == any(needs)
        for a, b in [(y, expected), *((next(got), b) for b, need in zip(wanted, needs, strict=True) if need)]:
            size = b.abs().max().item() + 1e-30
            assert (a.double() - b).abs().max().item() <= TOLERANCE[dtype] * size, (w is None, p, needs)


# ---- how a layer comes to compute its update alone ------------------------------------------------------------------


class Other(nn.Linear):
    """A class of somebody else's, with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 1.0


def adapted(kind="dense", base=None, two=False):
    model = nn.Sequential(nn.Linear(12, 20) if base is None else base, nn.Linear(20, 6))
    config = randlora.RandLoraConfig(r=3, kind=kind, sparsity=10.0 if kind == "very_sparse" else None,
                                     target_modules=["0"], randlora_dropout=0.5)  # fmt: skip
    model = randlora.get_peft_model(model, config)
    if two:
        model.add_adapter("second", config)
        model.set_adapter(["default", "second"])
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "randlora" in name:
                p.copy_(normal(*p.shape, seed=i))
    return model.train()


def ways():
    hooked = nn.Linear(12, 20)
    hooked.register_forward_hook(lambda module, args, out: out * 1.0)
    for kind in KINDS:
        yield f"two adapters {kind}", lambda kind=kind: (adapted(kind, two=True), {})
        yield f"subclass {kind}", lambda kind=kind: (adapted(kind, Other(12, 20)), {})
    yield "hook", lambda: (adapted(base=hooked), {})

    def trainable():
        model = adapted()
        next(p for n, p in model.named_parameters() if n.endswith("0.base_layer.weight") or n.endswith("0.weight")
             ).requires_grad_()  # fmt: skip
        return model, {}

    yield "trainable weight", trainable
    yield "mixed batch", lambda: (adapted(two=True), {"adapter_names": ["default", "second", "__base__", "default"]})


WAYS = dict(ways())


@pytest.mark.parametrize("way", WAYS)
def test_training_with_dropout(way):
    model, arguments = WAYS[way]()
    x = normal(4, 12).requires_grad_()
    model(x, **arguments).square().sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert parameters and all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in parameters.values())
