"""randlora.MultiheadAttention against torch's own, with weights merged by hand."""

import copy

import pytest
import torch
from helpers.attention_cases import (
    E,
    L,
    N,
    S,
    adapt,
    assert_close,
    assert_same_results,
    configs,
    make_base,
    make_inputs,
    make_masks,
    merged_by_hand,
)
from helpers.common import make_bases, normal, on_devices, randomize
from helpers.counted import SavedBytes
from torch import nn

from randlora import RandomBases
from randlora.layers.attention import PROJECTIONS, MultiheadAttention
from randlora.layers.mixed_batch import mixed_batch

# ---- results ----


@on_devices
@configs
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_every_option_gives_torchs_results(config, batched, device):
    base = make_base(device=device, **config)
    plain = MultiheadAttention(base, r=5)  # lambda is zero
    adapted = adapt(base)
    by_hand = {name: t.detach() for name, t in merged_by_hand(base, adapted).items()}
    cases = [make_inputs(base, batched=batched, device=device)]
    if base.kdim == base.vdim == E:
        cases.append(make_inputs(base, same=True, batched=batched, device=device))
    for inputs in cases:
        length = inputs[0].shape[1 if batched and base.batch_first else 0]
        for masks in make_masks(length, batched, device).values():
            for options in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                arguments = masks | options
                assert_same_results(plain(*inputs, **arguments), base(*inputs, **arguments))
                expected = torch.func.functional_call(base, by_hand, inputs, arguments)
                assert_same_results(adapted(*inputs, **arguments), expected)
    assert (adapted(*inputs)[0] - base(*inputs)[0]).abs().max() > 0.1, "the updates must matter"


@configs
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["none", "both_float", "causal"])
def test_gradients(config, need_weights, mask):
    base = make_base(**config)
    adapted = adapt(base)
    masks = {
        name: mask.clone().requires_grad_() if torch.is_tensor(mask) and mask.is_floating_point() else mask
        for name, mask in make_masks(L)[mask].items()
    }
    inputs = make_inputs(base)
    wanted = [t for t in (*inputs, *adapted.parameters(), *masks.values()) if getattr(t, "requires_grad", False)]
    weights = normal(*adapted(*inputs)[0].shape, dtype=torch.float64)

    def gradients(results):
        loss = (results[0] * weights).sum()
        if need_weights:
            loss = loss + results[1].square().sum()
        return torch.autograd.grad(loss, wanted)

    arguments = {"need_weights": need_weights, **masks}
    by_hand = merged_by_hand(base, adapted)
    if base.bias_k is not None:
        by_hand |= {"bias_k": adapted.bias_k, "bias_v": adapted.bias_v}
    expected = gradients(torch.func.functional_call(base, by_hand, inputs, arguments))
    got = gradients(adapted(*inputs, **arguments))
    assert sum(bool(g.abs().max() > 0) for g in expected) >= 3 + 8, "of the inputs, and of lambda and gamma"
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("config", [{}, {"batch_first": True}], ids=["length_first", "batch_first"])
def test_dropout_of_the_weights(need_weights, config):
    base = make_base(dropout=0.4, **config)
    plain = MultiheadAttention(base, r=5)
    inputs = make_inputs(base)
    results = []
    for module in (plain, base):
        torch.manual_seed(0)
        results.append(module(*inputs, need_weights=need_weights))
    assert_same_results(*results)
    assert not torch.equal(plain(*inputs)[0], plain(*inputs)[0])
    plain.eval(), base.eval()
    assert_same_results(plain(*inputs), base(*inputs))


def test_torchs_fused_inference_gives_the_same():
    base = make_base(batch_first=True).eval()
    adapted = adapt(base).eval()
    x = make_inputs(base, same=True)[0].detach()
    padding = make_masks(S)["padding"]
    unwrapped = copy.deepcopy(adapted)
    for name in PROJECTIONS:
        getattr(unwrapped, name).merge()
    unwrapped = unwrapped.unwrap()
    with torch.no_grad():
        for arguments in ({}, padding):
            for _ in range(3):  # the cached update too
                assert_same_results(adapted(x, x, x, **arguments), unwrapped(x, x, x, **arguments))


@pytest.mark.parametrize("projections", [("out_proj",), ("v_proj", "q_proj")], ids=str)
@pytest.mark.parametrize("config", [{}, {"kdim": 17, "vdim": 30}], ids=["packed", "separate"])
def test_some_projections(projections, config):
    base = make_base(**config)
    adapted = adapt(base, projections=projections)
    assert set(adapted.projections) == set(projections)
    assert all(type(getattr(adapted, name)) is nn.Linear for name in set(PROJECTIONS) - set(projections))
    inputs = make_inputs(base)
    expected = torch.func.functional_call(base, merged_by_hand(base, adapted), inputs)
    assert_same_results(adapted(*inputs), expected)
    assert (expected[0] - base(*inputs)[0]).abs().max() > 0.1


def test_samples_of_a_mixed_batch_keep_their_adapters_where_the_length_comes_first():
    base = make_base()
    adapted = adapt(base, projections=("q_proj", "v_proj"))
    adapted.add_adapter("other", r=5, randlora_alpha=2, bases=make_bases(30, E, 5))
    for i, name in enumerate(PROJECTIONS):
        randomize(getattr(adapted, name), seed=500 + 100 * i)
    x = normal(N, N, E, dtype=torch.float64)  # as long as the batch: the two could be mistaken
    layers = [getattr(adapted, name) for name in PROJECTIONS]
    names = ["other", "default", "__base__"]

    class Model(nn.Module):
        def forward(self, x):  # batch first outside
            x = x.transpose(0, 1)
            return adapted(x, x, x)[0].transpose(0, 1)

    model = Model()
    with mixed_batch(model, layers, names):
        got = model(x)
    for i, name in enumerate(names):
        t = x[i]
        weights = {} if name == "__base__" else merged_by_hand(base, adapted, name)
        assert_close(got[i], torch.func.functional_call(base, weights, (t, t, t))[0])


# ---- memory ----


@pytest.mark.parametrize("config", [{}, {"batch_first": True}], ids=["length_first", "batch_first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projections_keep_one_input(config, dtype):
    base = make_base(dtype=torch.float32, **config).to(dtype).requires_grad_(False)
    bases = RandomBases(E, E, 5)
    adapted = MultiheadAttention(base, r=5, bases=bases)
    x = make_inputs(base, same=True, dtype=dtype)[0]

    def saved(module, known=()):
        with SavedBytes([*module.parameters(), *known]) as kept:
            module(x, x, x, need_weights=False)
        return kept

    torchs, ours = saved(base), saved(adapted, bases.tensors(dtype, x.device))
    assert sum(t.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
               for _, t in ours.storages.values()) == 1  # fmt: skip
    # Beyond torch's: the input of q, k and v, and that of out_proj.
    assert ours.bytes <= torchs.bytes + 2 * x.nbytes


def test_the_base_layer_is_not_kept():
    base = make_base()
    adapted = adapt(base)
    own = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    assert own.isdisjoint(p.untyped_storage().data_ptr() for p in base.parameters())
    assert sum(p.numel() for n, p in adapted.named_parameters() if "randlora" not in n) == sum(
        p.numel() for p in base.parameters()
    )
    biggest = max(p.untyped_storage().nbytes() for p in adapted.parameters())
    assert biggest == E * E * 8, "no projection holds on to the packed weight"
    assert all(p.requires_grad for p in base.parameters())
