"""Estimates for models of all sorts, which stay as they were; and what cannot be told."""

import gc
import weakref

import pytest
import torch
from helpers.estimates import TOKENS, config
from helpers.models import IDS, Net, net, tiny_gpt2
from torch import nn

import randlora
from randlora import RandomBases, estimate
from randlora.model.adapter_plan import own_bases
from randlora.model.parts import adapted_layers


@pytest.mark.parametrize("case", ["meta", "conv1d", "attention", "double"])
def test_whatever_can_be_adapted_can_be_told_of(case):
    if case == "conv1d":
        make, settings, given = tiny_gpt2, {"r": 4, "target_modules": ["c_attn", "c_fc"]}, {}
    elif case == "attention":
        make = lambda: nn.TransformerEncoderLayer(24, 2, 30, batch_first=True)  # noqa: E731
        settings, given = {"r": 4, "target_modules": ["self_attn", "linear1"]}, {"inputs": torch.zeros(2, 10, 24)}
    else:
        make, settings, given = (lambda: net(torch.float64)), config(), {"inputs": IDS}
    subject = make().to("meta") if case == "meta" else make()
    result = estimate(subject, settings, TOKENS, device="cpu", **given)
    assert result == estimate(make(), settings, TOKENS, **given) and result["inputs"] == "counted", result["notes"]
    model = randlora.get_peft_model(make(), settings)
    assert result["methods"]["dense"]["trainable_parameters"] == model.get_nb_trainable_parameters()[0]
    assert result["layers"] == len(adapted_layers(model.model))
    if case == "attention":
        rows = [(r["in_features"], r["out_features"], r["count"]) for r in result["methods"]["dense"]["shapes"]]
        assert rows[0] == (24, 24, 3)  # q, k and v: no gradient of the input; out_proj has one


def test_quantised_layers_compute_their_own_product():
    pytest.importorskip("bitsandbytes")
    from helpers.quantized_layers import make_base

    x = torch.zeros(6, 41, requires_grad=True)
    quantised = estimate(nn.Sequential(make_base("nf4"), nn.Linear(24, 9)), config(target_modules=["0"]), 6, inputs=x)
    plain = estimate(nn.Sequential(nn.Linear(41, 24), nn.Linear(24, 9)), config(target_modules=["0"]), 6, inputs=x)
    assert quantised["inputs"] == "counted" and quantised["dtype"] == "float32"
    here, there = quantised["methods"]["dense"], plain["methods"]["dense"]
    of_strategies = dict.fromkeys(("shapes", "multiply_adds", "forward_multiply_adds", "workspace_bytes"), 0)
    assert {**here, **of_strategies} == {**there, **of_strategies}
    assert all("merged" not in (r["forward"], r["backward"]) for r in here["shapes"])


def test_without_a_call_the_inputs_are_an_upper_bound():
    told = estimate(net(torch.float32), config(), TOKENS)
    assert told["inputs"] == "upper bound" and "upper bound" in str(told)
    assert told["methods"]["dense"]["saved_bytes"] == 4 * TOKENS * 2 * (13 + 13 + 13 + 22)
    counted = estimate(net(torch.float32), config(), TOKENS, inputs=IDS)["methods"]["dense"]
    assert counted["saved_bytes"] < told["methods"]["dense"]["saved_bytes"]


def test_the_trial_call_leaves_nothing_behind():
    kept = []

    def noted(tensor):
        kept.append(weakref.ref(result := tensor.exp()))
        return result

    class Squared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            hidden = noted(self.a(x))
            return self.b(hidden * hidden)

    estimate(Squared(), {"r": 2, "target_modules": ["a", "b"]}, tokens=2, inputs=(torch.ones(2, 3),))
    gc.collect()
    assert kept and [ref() for ref in kept] == [None] * len(kept)


def test_cuda_keeps_medium_density_as_bits():
    """No CUDA device is needed to tell of one."""
    here, there = (estimate(net(), config(), TOKENS, device=d)["methods"] for d in ("cpu", "cuda"))
    assert (here["sparse"]["bases_form"], there["sparse"]["bases_form"]) == ("planes", "bits")
    assert here["hadamard"]["bases_form"] == there["hadamard"]["bases_form"] == "signs"
    assert here["sign"]["bases_form"] == there["sign"]["bases_form"] == "bits"
    assert there["sparse"]["bases_bytes"] == 2 * there["sign"]["bases_bytes"] == 2 * here["sign"]["bases_bytes"]


def test_nothing_is_changed_and_no_bases_are_made(monkeypatch):
    def no(*args):
        raise AssertionError("bases were made")

    _, mine = own_bases(config(), {"": (1, 1)}, (1, 1))  # those that a model would take
    mine.require(3, 3, 1)
    mine.tensors()
    size = mine.max_dim, mine.min_dim  # or larger ones that other tests have left
    monkeypatch.setattr(RandomBases, "fill", no)
    model, settings = net(torch.float32), config(kind="very_sparse", modules_to_save=["head"])
    before = {n: (id(p), p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    kinds, said, held = [type(m) for m in model.modules()], settings.to_dict(), mine.copies.dense
    estimate(model, settings, TOKENS, inputs=IDS)
    assert [type(m) for m in model.modules()] == kinds and settings.to_dict() == said
    for name, p in model.named_parameters():
        assert (id(p), p.requires_grad) == (before[name][0], before[name][2]) and torch.equal(p, before[name][1])
    assert (mine.max_dim, mine.min_dim) == size and mine.copies.dense.keys() == held.keys()


# ---- what cannot be told ----


@pytest.mark.parametrize("arguments, error, match", [
    ({"config": config(target_modules=["q_prj"])}, ValueError, "did you mean 'q_proj'"),
    ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
    ({"tokens": 2.0}, TypeError, "tokens must be an integer, got 2.0"),
    ({"tokens": True}, TypeError, "tokens must be an integer"),
    ({"config": "q_proj"}, TypeError, "config must be a randlora.RandLoraConfig"),
    ({"model": [net]}, TypeError, "model must be a torch.nn.Module, got list"),
    ({"kinds": ["thick"]}, ValueError, "kinds must be among dense, hadamard, sparse, very_sparse, sign"),
    ({"config": config(prng="peft"), "kinds": "sign"}, ValueError, "got 'sign'"),
    ({"config": config(prng="peft"), "kinds": "hadamard"}, ValueError, "dense, sparse, very_sparse with .* got 'hada"),
    ({"autocast": torch.int8}, TypeError, "autocast must be one of"),
    ({"config": config(strategy="merged", randlora_dropout=0.1)}, ValueError, "merged.* takes no dropout"),
], ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value))  # fmt: skip
def test_errors_name_what_is_wrong(arguments, error, match):
    with pytest.raises(error, match=match):
        estimate(**{"model": Net(), "config": config(), "tokens": TOKENS} | arguments)


def test_an_adapted_model_is_refused():
    with pytest.raises(ValueError, match="adapted already"):
        estimate(randlora.get_peft_model(net(), config()), config(), TOKENS)
