"""Small models, and what several test modules ask of them: random adapters, references in float64, snapshots."""

import copy

import pytest
import torch
from torch import nn

import randlora
from helpers.common import normal, reference_update
from randlora.layers.randlora_layer import RandLoraLayer
from randlora.model.parts import adapted_layers

WIDTH, HIDDEN, WORDS, CLASSES = 13, 22, 19, 7
IDS = torch.randint(0, WORDS, (4, 5), generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up_proj, self.down_proj = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
        x = x + torch.tanh(self.q_proj(x)) * self.v_proj(x)
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Net(nn.Module):
    """Token ids ``[batch, tokens]`` to ``[batch, tokens, CLASSES]``, with square layers and both orientations."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, ids, scale=1.0):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return scale * self.head(x)


def net(dtype=torch.float64):
    """The same weights at every call."""
    return numbered(Net().to(dtype))


def numbered(model):
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(normal(*p.shape, seed=900 + i) * (0.7 * p.shape[-1] ** -0.5 if p.dim() == 2 else 0.3))
    return model


def tiny_llama(**changes):
    transformers = pytest.importorskip("transformers")
    config = {
        "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 32, "pad_token_id": 0,
    }  # fmt: skip
    return _seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(**config | changes))


def tiny_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=24, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return _seeded(transformers.GPT2LMHeadModel, config)


def tiny_bert(cls="BertForSequenceClassification"):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40, vocab_size=WORDS,
        max_position_embeddings=16, num_labels=3,
    )  # fmt: skip
    return _seeded(getattr(transformers, cls), config)


def _seeded(cls, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(config).eval()


SETTINGS = {"r": 4, "randlora_alpha": 3, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


def adapt(model, adapter_name="default", seed=1, **settings):
    """`model` with one adapter whose lambda and gamma are random."""
    adapted = randlora.get_peft_model(model, randlora.RandLoraConfig(**SETTINGS | settings), adapter_name)
    return randomize(adapted, adapter_name, seed)


def add(model, adapter_name, seed, **settings):
    model.add_adapter(adapter_name, randlora.RandLoraConfig(**SETTINGS | settings))
    return randomize(model, adapter_name, seed)


def randomize(model, adapter_name="default", seed=1):
    with torch.no_grad():
        for i, layer in enumerate(layers_of(model, adapter_name).values()):
            lam, gamma = layer.randlora_lambda[adapter_name], layer.randlora_gamma[adapter_name]
            lam.copy_(normal(*lam.shape, seed=1000 * seed + 2 * i))
            gamma.copy_(normal(*gamma.shape, seed=1000 * seed + 2 * i + 1) * 0.3 * lam.numel() ** -0.5)
    return model


def layers_of(model, adapter_name=None):
    """Path -> adapted layer, of one adapter or all."""
    layers = adapted_layers(model.model)
    return {p: layer for p, layer in layers.items() if adapter_name is None or adapter_name in layer.randlora_lambda}


def merged_by_hand(plain, model, adapters):
    """`plain`, the unadapted model, in float64 with the updates of `adapters` added to its weights by the formula."""
    plain = copy.deepcopy(plain).double()
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            for name in adapters:
                if name in layer.randlora_lambda:
                    update = reference_update(layer, name)
                    plain.get_submodule(path).weight.add_(update.T if layer.fan_in_fan_out else update)
    return plain.eval()


def assert_computes(model, adapters, plain=None, ids=IDS, tolerance=1e-11, call=None):
    """`model` equals the formula, and the adapters do change something."""
    call = call or (lambda m: m(ids))
    plain = net() if plain is None else plain
    expected = call(merged_by_hand(plain, model, adapters))
    torch.testing.assert_close(call(model).double(), expected, rtol=tolerance, atol=tolerance)
    if adapters:
        assert (expected - call(copy.deepcopy(plain).double())).abs().max() > 0.05


LAYERS_ALONE = (
    "randlora_lambda", "randlora_gamma", "bases", "scaling", "num_bases", "merged_adapters", "merged", "merge",
    "get_delta_weight", "get_base_layer", "update_layer",
)  # fmt: skip


def assert_only_layers_look_like_layers(model, but=()):
    """What has an attribute of adapted layers, `but` for these, is one and has all of them."""
    for path, module in model.named_modules():
        if path and module is not getattr(model, "base_model", None):  # what stands for the whole model may have more
            wanted = set(LAYERS_ALONE) - set(but)
            has = {name for name in wanted if hasattr(module, name)}
            assert has == (wanted if isinstance(module, RandLoraLayer) else set()), f"{path}: {has}"


def snapshot(model):
    """All that an error must leave as it was."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: (type(m), m.training) for name, m in model.named_modules()},
        copy.deepcopy(getattr(model, "peft_config", None)),
        getattr(model, "active_adapters", None) if isinstance(model, randlora.RandLoraModel) else None,
    )


def assert_unchanged(model, before):
    now = snapshot(model)
    assert now[0].keys() == before[0].keys()
    for name, value in before[0].items():
        assert torch.equal(value, now[0][name]), name
    assert now[1:] == before[1:]
