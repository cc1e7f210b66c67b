"""Merged, read and unmerged at every step of a training, as for reinforcement learning: the base weights stay."""

import itertools

import pytest
import torch
from helpers.experts_cases import tiny
from helpers.models import IDS, adapt, add, tiny_gpt2, tiny_llama

CYCLES = 200
over_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
pytestmark = pytest.mark.filterwarnings("ignore:.*shares its weight with", "ignore:merging into")


def frozen(model):
    """Name -> the bytes of what is not trained, so that every bit counts."""
    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    inside = ("randlora_", ".modules_to_save.")
    return {n: v.clone().contiguous().view(torch.uint8) for n, v in state.items() if not any(i in n for i in inside)}


def assert_same_bits(model, before):
    now = frozen(model)
    assert now.keys() == before.keys()
    assert {name: int((now[name] != value).sum()) for name, value in before.items()} == dict.fromkeys(before, 0)


def plain(name):
    return name.removeprefix("model.").replace(".base_layer", "")


def train(model, optimizer):
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def trained(model, lr=0.01):
    return torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, eps=1e-3
    )  # an fp16 copy would not bear 1e-8


@over_dtypes
def test_several_adapters_and_a_module_of_its_own(dtype):
    """All that act are merged, or one of two, or one after the other; the merged model is read meanwhile, too."""
    model = adapt(tiny_llama(num_hidden_layers=1).to(dtype), modules_to_save=["norm"], randlora_alpha=0.5)
    add(model, "b", 2, r=3, kind="hadamard", target_modules=["q_proj", "o_proj"], randlora_alpha=0.5)
    model.set_adapter(["default", "b"])
    before, optimizer = frozen(model), trained(model)
    merged = [n for n in before if ("q_proj" in n or "down_proj" in n) and n.endswith("weight")]
    losses, different = [], set()
    for i in range(CYCLES):
        if i % 10 == 0:
            losses.append(train(model, optimizer))
        sent = dict(model.merged_tensors()) if i % 4 == 0 else {}
        for names in ((None,), (["b"],), (["default"],), (["default"], ["b"]))[i % 4]:
            model.merge_adapter(names)
        if i % 4 == 0:
            now = frozen(model)
            different.add(hash(now[merged[0]].numpy().tobytes()))
            assert not any(torch.equal(now[name], before[name]) for name in merged)
            assert all(torch.equal(now[name], sent[plain(name)].view(torch.uint8)) for name in merged)
        model.unmerge_adapter()
    assert_same_bits(model, before)
    assert losses[-1] < losses[0] and len(different) == CYCLES // 10


@over_dtypes
def test_transposed_weights_and_a_tied_head(dtype):
    model = tiny_gpt2().to(dtype)
    model = adapt(model, target_modules=["c_attn", "c_proj", "lm_head"], randlora_alpha=0.5)
    before, optimizer = frozen(model), trained(model)
    for i in range(CYCLES):
        if i % 10 == 0:
            train(model, optimizer)
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model, before)


@pytest.mark.parametrize("what", ["attention", "experts"])
def test_several_weights_in_a_module(what):
    if what == "attention":
        torch.manual_seed(0)
        model = torch.nn.TransformerEncoderLayer(12, 2, 20, batch_first=True, dtype=torch.bfloat16)
        model = adapt(model, target_modules=["self_attn"], randlora_alpha=0.5)
    else:
        model, names = tiny("Mixtral", torch.bfloat16, num_hidden_layers=1), ["experts.gate_up_proj"]
        model = adapt(model, target_modules=[], target_parameters=names, randlora_alpha=0.5)
    before, lam = frozen(model), [p for n, p in model.named_parameters() if "randlora_lambda" in n]
    for _ in range(CYCLES):
        with torch.no_grad():
            torch._foreach_mul_(lam, 1.01)
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same_bits(model, before)


def test_quantised_weights():
    pytest.importorskip("torchao")
    from helpers.quantized_layers import make_layer, parts

    layer = make_layer("int8", dtype=torch.bfloat16)
    before = [part.clone() for part in parts(layer.base_layer)]
    for _ in range(CYCLES):
        with torch.no_grad():
            layer.randlora_lambda["default"].mul_(1.01)
        layer.merge()
        layer.unmerge()
    assert all(torch.equal(a, b) for a, b in zip(parts(layer.base_layer), before, strict=True))


@over_dtypes
def test_models_of_peft(dtype):
    """PEFT's own do not give all weights back (docs/export.md)."""
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft as integration

    config = peft.RandLoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], randlora_alpha=8, modules_to_save=["norm"]
    )
    with integration.enable():
        model = peft.get_peft_model(tiny_llama(num_hidden_layers=1).to(dtype), config)
        model.add_adapter("b", peft.RandLoraConfig(r=3, target_modules=["q_proj", "o_proj"], randlora_alpha=8))
    model.base_model.set_adapter(["default", "b"])
    before, optimizer = frozen(model), trained(model, 0.02)
    different = set()
    for i, names in zip(range(CYCLES), itertools.cycle([None, ["b"], ["default"]])):
        if i % 10 == 0:
            train(model, optimizer)
        model.merge_adapter(names)
        different.add(hash(frozen(model)[next(n for n in before if "q_proj.base_layer" in n)].numpy().tobytes()))
        model.unmerge_adapter()
    assert_same_bits(model, before)
    assert len(different) > CYCLES // 10
