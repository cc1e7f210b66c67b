"""Attention modules, inputs, masks and references that the tests of randlora.MultiheadAttention share."""

import pytest
import torch
from torch import nn

from helpers.common import make_bases, normal, randomize, reference_dW
from randlora import Linear
from randlora.layers.attention import PROJECTIONS, MultiheadAttention

E, HEADS, N, L, S = 24, 4, 3, 5, 7
IN = ("q_proj", "k_proj", "v_proj")

CONFIGS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no_bias": {"bias": False, "batch_first": True},
    "kdim_vdim": {"kdim": 17, "vdim": 30},
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True, "batch_first": True},
    "all": {"kdim": 30, "vdim": 24, "add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def make_base(dtype=torch.float64, device="cpu", dropout=0.0, heads=HEADS, **config):
    base = nn.MultiheadAttention(E, heads, dropout=dropout, dtype=dtype, device=device, **config)
    with torch.no_grad():
        for i, p in enumerate(base.parameters()):
            p.copy_(normal(*p.shape, seed=30 + i) * (p.shape[-1] ** -0.5 if p.dim() == 2 else 0.5))
    return base


def adapt(base, r=5, randlora_alpha=2.0, seed=50, **settings):
    settings.setdefault("bases", make_bases(30, E, r))
    attention = MultiheadAttention(base, r=r, randlora_alpha=randlora_alpha, **settings)
    for i, name in enumerate(attention.projections):
        randomize(getattr(attention, name), seed=seed + 100 * i)
    return attention


def updates(attention, adapter="default"):
    """dW by projection, from the formula, differentiable in lambda and gamma; zero where nothing is adapted."""
    found = {}
    for name in PROJECTIONS:
        layer = getattr(attention, name)
        found[name] = torch.zeros_like(layer.weight)
        if isinstance(layer, Linear) and adapter in layer.randlora_lambda:
            A, B = (t.to(layer.weight.device) for t in layer.bases[adapter].to(torch.float64).tensors())
            lam, gamma = layer.randlora_lambda[adapter], layer.randlora_gamma[adapter]
            found[name] = reference_dW(A, B, lam, gamma, layer.scaling[adapter], layer.in_features, layer.out_features)
    return found


def merged_by_hand(base, attention, adapter="default"):
    """The weights of `base` with the updates of `attention` in them, by torch's names."""
    dW = updates(attention, adapter)
    weights = {"out_proj.weight": base.out_proj.weight + dW["out_proj"]}
    if base.in_proj_weight is not None:
        weights["in_proj_weight"] = base.in_proj_weight + torch.cat([dW[name] for name in IN])
    else:
        weights |= {f"{name}_weight": getattr(base, f"{name}_weight") + dW[name] for name in IN}
    return weights


def make_inputs(base, same=False, batched=True, device="cpu", dtype=torch.float64):
    """query, key and value, as one tensor if `same`, in the layout of `base`."""

    def make(length, features, seed):
        x = normal(N, length, features, seed=seed, device=device, dtype=dtype)
        x = x[0] if not batched else x if base.batch_first else x.transpose(0, 1).contiguous()
        return x.requires_grad_()

    if same:
        return (make(S, E, 20),) * 3
    return make(L, E, 20), make(S, base.kdim, 21), make(S, base.vdim, 22)


def make_masks(length, batched=True, device="cpu"):
    """Keyword arguments of forward with masks of every kind; no row is masked altogether."""
    padding = torch.zeros(N, S, dtype=torch.bool)
    padding[1, 3:] = padding[2, 6:] = True
    padding = padding.to(device) if batched else padding[1].to(device)
    blocked = torch.ones(length, S, dtype=torch.bool, device=device).triu(1)
    rows = (N if batched else 1) * HEADS
    each = (normal(rows, length, S, seed=9, device=device) > 1).index_fill(2, torch.tensor(0, device=device), False)
    bias = normal(rows, length, S, seed=8, dtype=torch.float64, device=device)
    causal = {"is_causal": True, "attn_mask": blocked}
    soft = torch.zeros(padding.shape, dtype=torch.float64, device=device).masked_fill(padding, -2.5)
    return {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "soft_padding": {"key_padding_mask": soft},
        "2d": {"attn_mask": blocked},
        "2d_float": {"attn_mask": bias[0]},
        "3d": {"attn_mask": each},
        "3d_float": {"attn_mask": bias},
        "both": {"attn_mask": each, "key_padding_mask": padding},
        "both_float": {"attn_mask": bias[0], "key_padding_mask": soft},
        "causal": causal,
        "causal_padding": causal | {"key_padding_mask": padding},
    }


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def assert_same_results(got, expected):
    assert (got[1] is None) == (expected[1] is None)
    for a, b in zip(got, expected, strict=True):
        if a is not None:
            assert_close(a, b)
