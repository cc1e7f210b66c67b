"""randlora.MultiheadAttention: its adapters, its state, what it refuses, and how it becomes torch's module again."""

import copy
import pickle

import pytest
import torch
from helpers.attention_cases import (
    HEADS,
    IN,
    E,
    N,
    S,
    adapt,
    assert_close,
    assert_same_results,
    configs,
    make_base,
    make_inputs,
    merged_by_hand,
)
from helpers.common import normal, randomize
from torch import nn

from randlora import Linear, RandomBases
from randlora.layers.attention import PROJECTIONS, MultiheadAttention

# ---- putting it together again ----


class Numbered(nn.MultiheadAttention):
    """A subclass with an attribute of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.number = 3


@configs
@pytest.mark.parametrize("merged", [False, True])
def test_unwrap(config, merged):
    base = make_base(dropout=0.25, **config).eval()
    next(base.parameters()).requires_grad_(False)
    base.out_proj.weight.requires_grad_(merged)
    adapted = adapt(base)
    if merged:
        for name in PROJECTIONS:
            getattr(adapted, name).merge()
    plain = adapted.unwrap()
    assert type(plain) is nn.MultiheadAttention and type(plain.out_proj) is type(base.out_proj)
    assert vars(plain).keys() == vars(base).keys()
    settings = [{k: v for k, v in vars(m).items() if not isinstance(v, dict)} for m in (plain, base)]
    assert settings[0] == settings[1] and not plain.training
    assert list(plain._parameters) == list(base._parameters)
    expected = dict(base.named_parameters()) | (merged_by_hand(base, adapted) if merged else {})
    for (name, p), (base_name, old) in zip(plain.named_parameters(), base.named_parameters(), strict=True):
        assert name == base_name and p.requires_grad == old.requires_grad
        assert_close(p.detach(), expected[name].detach())
    inputs = make_inputs(base)
    assert_same_results(plain(*inputs), torch.func.functional_call(base, expected, inputs))
    with torch.no_grad():
        before = adapted.in_proj_bias.clone() if config.get("bias", True) else None
        for p in plain.parameters():
            p.zero_()
    if before is not None:
        assert torch.equal(adapted.in_proj_bias, before), "what comes out has parameters of its own"


def test_unwrap_gives_the_class_and_the_settings_of_now():
    base = Numbered(E, HEADS)
    adapted = MultiheadAttention(base, r=5)
    assert adapted.number == 3 and not adapted.out_proj.get_base_layer().weight.requires_grad
    adapted.dropout, adapted.number = 0.5, 4
    adapted.register_forward_hook(lambda *_: None)
    plain = adapted.unwrap()
    assert type(plain) is Numbered and (plain.dropout, plain.number) == (0.5, 4)
    assert plain.training and not plain._forward_hooks
    assert all(p.requires_grad for p in plain.parameters())


# ---- adapters ----


def test_a_later_adapter_targets_more_projections():
    base = make_base(batch_first=True)
    adapted = adapt(base, projections=("q_proj",), strategy="factored").eval()
    adapted.add_adapter("more", projections=("q_proj", "v_proj", "out_proj"), strategy="materialized", r=8, num_bases=2)
    assert adapted.projections == ("q_proj", "v_proj", "out_proj")
    assert [getattr(adapted, n).strategy for n in adapted.projections] == ["factored", "materialized", "materialized"]
    assert adapted.q_proj.r == {"default": 5, "more": 8} and adapted.v_proj.num_bases == {"more": 2}
    assert [getattr(adapted, n).active_adapters for n in adapted.projections] == [["default"], [], []]
    assert not any(m.training for m in (adapted, *adapted.children()))
    for i, name in enumerate(adapted.projections):
        randomize(getattr(adapted, name), seed=700 + 100 * i)
    inputs = make_inputs(base)
    for adapter in ("default", "more"):
        for name in adapted.projections:
            layer = getattr(adapted, name)
            layer.set_adapter([adapter] if adapter in layer.randlora_lambda else [])
        expected = torch.func.functional_call(base, merged_by_hand(base, adapted, adapter), inputs)
        assert_same_results(adapted(*inputs), expected)


def test_added_projections_follow_the_others():
    adapted = adapt(make_base(), projections=("q_proj",))
    adapted.q_proj.delete_adapter("default")
    adapted.add_adapter("new", r=5)
    assert [getattr(adapted, name).active_adapters for name in PROJECTIONS] == [["new"]] * 4
    adapted = adapt(make_base(), projections=("q_proj",))
    adapted.q_proj.enable_adapters(False)
    adapted.add_adapter("default", projections=("k_proj",), r=5)
    assert adapted.k_proj.disable_adapters
    assert not any(p.requires_grad for p in adapted.k_proj.parameters())
    adapted = adapt(make_base(), projections=("q_proj",))
    adapted.q_proj.set_adapter("default", inference_mode=True)
    adapted.add_adapter("default", projections=("k_proj",), r=5)
    assert adapted.k_proj.active_adapters == ["default"]
    assert not any("randlora" in name for name, p in adapted.named_parameters() if p.requires_grad)


BAD = [
    ({"r": 0}, ValueError, "r must be at least 1"),
    ({"projections": ("q_proj", "in_proj")}, ValueError, r"some of q_proj, .*got \['in_proj'\]"),
    ({"projections": "q_proj"}, ValueError, "a list of .*got 'q_proj'"),
    ({"projections": ()}, ValueError, "a list of"),
    ({"strategy": "fast"}, ValueError, "strategy must be one of"),
    # The bases are large enough for q_proj and too small for v_proj: found before q_proj is touched.
    ({"bases": RandomBases(24, 24, 5, prng="peft")}, ValueError, "too small"),
]


@pytest.mark.parametrize(
    ("settings", "error", "message"), BAD, ids=lambda v: next(iter(v)) if isinstance(v, dict) else ""
)
def test_bad_settings_change_nothing(settings, error, message):
    base = make_base(vdim=30)
    with pytest.raises(error, match=message):
        MultiheadAttention(base, **({"r": 5} | settings))
    assert all(p.requires_grad for p in base.parameters())
    adapted = adapt(base, projections=("q_proj",))
    before = repr(adapted), set(adapted.state_dict()), [p.requires_grad for p in adapted.parameters()]
    with pytest.raises(error, match=message):
        adapted.add_adapter("second", **({"r": 5} | settings))
    with pytest.raises(ValueError, match="q_proj already has an adapter named 'default'"):
        adapted.add_adapter("default", projections=("v_proj", "q_proj"), r=5)
    assert (repr(adapted), set(adapted.state_dict()), [p.requires_grad for p in adapted.parameters()]) == before


class OwnForward(nn.MultiheadAttention):
    def forward(self, x):
        return x


def with_part(base, name, part):
    setattr(base, name, part)
    return base


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(3, 3), TypeError, "must be a torch.nn.MultiheadAttention, got Linear"),
        (lambda: adapt(make_base()), TypeError, r"adapted already.*add_adapter"),
        (lambda: OwnForward(E, HEADS), TypeError, "OwnForward has its own forward"),
        (lambda: with_part(make_base(), "rotary", nn.Identity()), TypeError, "parts that .* has not: rotary"),
        (
            lambda: with_part(make_base(), "out_proj", Linear(nn.Linear(E, E))),
            TypeError,
            "out_proj must be torch's own",
        ),
    ],
    ids=["linear", "twice", "forward", "parts", "out_proj"],
)
def test_base_layers_that_would_lose_something(make, error, message):
    with pytest.raises(error, match=message):
        MultiheadAttention(make())


def test_hooks_would_be_lost():
    base = make_base()
    base.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks, which would be lost"):
        MultiheadAttention(base)


def test_bad_inputs():
    adapted = adapt(make_base(batch_first=True))
    x = normal(N, S, E, dtype=torch.float64)
    for arguments, error, message in (
        ((x[None], x, x), ValueError, "3 dimensions .*got 4, 3 and 3"),
        ((x, x[0], x), ValueError, "3 dimensions .*got 3, 2 and 3"),
        ((x[..., :5], x, x), ValueError, r"\(24, 24, 24\) features, got \(5, 24, 24\)"),
        ((x, x[:, 1:], x), ValueError, "key and value must agree"),
        ((x[:2], x, x), ValueError, "same batch size, got 2 and 3"),
    ):
        with pytest.raises(error, match=message):
            adapted(*arguments)
    for arguments, error, message in (
        ({"is_causal": True}, ValueError, "needs it, got attn_mask=None"),
        ({"attn_mask": torch.zeros(S, S + 1)}, ValueError, r"\(7, 7\) or \(12, 7, 7\), got \(7, 8\)"),
        ({"attn_mask": torch.zeros(N, S, S)}, ValueError, r"\(7, 7\) or \(12, 7, 7\), got \(3, 7, 7\)"),
        ({"attn_mask": torch.zeros(S, S, dtype=torch.long)}, TypeError, "attn_mask must have dtype bool .*int64"),
        ({"key_padding_mask": torch.zeros(S, N)}, ValueError, r"\(3, 7\) .*got \(7, 3\)"),
    ):
        with pytest.raises(error, match=message):
            adapted(x, x, x, **arguments)


# ---- state ----


@configs
def test_torchs_names_for_reading(config):
    base = make_base(**config)
    adapted = adapt(base)
    for name in ("embed_dim", "num_heads", "head_dim", "kdim", "vdim", "batch_first", "dropout", "add_zero_attn"):
        assert getattr(adapted, name) == getattr(base, name)
    assert isinstance(adapted, nn.MultiheadAttention)
    for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
        ours, torchs = getattr(adapted, name), getattr(base, name)
        assert (ours is None) == (torchs is None) and (ours is None or torch.equal(ours, torchs))
    for name in IN:
        getattr(adapted, name).merge()
    expected = {k: v.detach() for k, v in merged_by_hand(base, adapted).items()}
    for name in set(expected) - {"out_proj.weight"}:
        assert_close(getattr(adapted, name).detach(), expected[name])
    assert_close(torch.cat([adapted.q_proj_weight, adapted.k_proj_weight], 1), torch.cat([adapted.q_proj.weight,
                 adapted.k_proj.weight], 1))  # fmt: skip


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_and_state_dicts(duplicate):
    base = make_base(add_bias_kv=True)
    adapted = adapt(base)
    inputs = make_inputs(base)
    other = duplicate(adapted)
    assert_same_results(other(*inputs), adapted(*inputs))
    third = adapt(make_base(add_bias_kv=True), seed=900)
    assert not torch.equal(third(*inputs)[0], adapted(*inputs)[0])
    assert third.load_state_dict(adapted.state_dict()) == ([], [])
    assert_same_results(third(*inputs), adapted(*inputs))
    keys = {key.split(".", 1)[0] for key in adapted.state_dict()}
    assert keys == {*PROJECTIONS, "bias_k", "bias_v"}
    with torch.no_grad():
        other.q_proj.randlora_lambda["default"].zero_()
    assert not torch.equal(other(*inputs)[0], adapted(*inputs)[0])
    assert_same_results(third(*inputs), adapted(*inputs))
