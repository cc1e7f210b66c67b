"""Fused experts as transformers has them, of small models and alone, and the same with updates by the formula."""

import inspect

import pytest
import torch
from torch import nn

import randlora
from helpers.common import normal, randomize, reference_dW
from helpers.models import WORDS, _seeded

E, HIDDEN, TOKENS = 5, 16, 7
SMALL = {
    "hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    "vocab_size": WORDS, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "Mixtral": {"intermediate_size": 21, "num_local_experts": E, "num_experts_per_tok": 2},
    # in > out, too
    "Qwen3Moe": {"moe_intermediate_size": 6, "intermediate_size": 20, "num_experts": E, "num_experts_per_tok": 3},
    # transposed weights, biases, a gate of its own
    "GptOss": {"intermediate_size": 11, "num_local_experts": E, "num_experts_per_tok": 2},
}
# grouped_mm takes rows of 16 bytes only.
EVEN = {
    "Mixtral": {"intermediate_size": 24},
    "Qwen3Moe": {"moe_intermediate_size": 8},
    "GptOss": {"intermediate_size": 8},
}
families = pytest.mark.parametrize("family", FAMILIES)
TOP_K = {name: family["num_experts_per_tok"] for name, family in FAMILIES.items()}
FORMS = {  # of a class of the user's
    "no gate": {},
    "no gate, transposed, bias": {"is_transposed": True, "has_bias": True},
    "gate, bias, norm": {"has_gate": True, "has_bias": True, "has_post_expert_norm": True},
}


def moe():
    """transformers' module of fused experts, which transformers 4 has not."""
    pytest.importorskip("transformers")
    return pytest.importorskip("transformers.integrations.moe")


def tiny(family, dtype=torch.float64, implementation="eager", **changes):
    """A model with random weights. grouped_mm, the default, has no float64."""
    moe()
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{family}Config")(**SMALL | FAMILIES[family] | changes)
    model = _seeded(getattr(transformers, f"{family}ForCausalLM"), config).to(dtype)
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "experts" in name:
                p.copy_(normal(*p.shape, seed=700 + i) * 0.3)
    return model.eval()


def own(dtype=torch.float64, num_experts=E, hidden=HIDDEN, inner=11, **flags):
    """A class of the user's in transformers' form."""
    flags = {"has_gate": False, "is_transposed": False, "has_bias": False} | flags

    class OwnExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.num_experts = num_experts
            self.act_fn = nn.Tanh()
            width = inner * (1 + flags["has_gate"])
            for name, first, last in (("up", hidden, width), ("down", inner, hidden)):
                name = "gate_up_proj" if flags["has_gate"] and name == "up" else f"{name}_proj"
                shape = (first, last) if flags["is_transposed"] else (last, first)
                self.register_parameter(name, nn.Parameter(torch.empty(num_experts, *shape)))
                if flags["has_bias"]:
                    self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(num_experts, last)))
            if flags.get("has_post_expert_norm"):
                self.post_expert_norm = nn.LayerNorm(hidden)

        def forward(self, hidden_states, top_k_index, top_k_weights):
            raise AssertionError("batched_mm was asked for")

    class Config:
        _experts_implementation = "batched_mm"

    known = inspect.signature(moe().use_experts_implementation).parameters
    if "has_post_expert_norm" in flags and "has_post_expert_norm" not in known:
        pytest.skip("this transformers has no experts with a norm")
    experts = moe().use_experts_implementation(OwnExperts, **flags)(Config()).to(dtype)
    return _numbered(experts)


def experts_of(family, dtype=torch.float64, even=False):
    return tiny(family, dtype, **EVEN[family] if even else {}).model.layers[0].mlp.experts


def _numbered(experts):
    with torch.no_grad():
        for i, p in enumerate(experts.parameters()):
            p.copy_(normal(*p.shape, seed=800 + i) * 0.4)
    return experts.eval()


def adapt(base, adapter="default", seed=0, parameters=None, r=3, **settings):
    """Random lambda and gamma; bases of its own where a kind is asked for."""
    if "kind" in settings:
        settings["bases"] = randlora.RandomBases(64, 32, r, kind=settings.pop("kind"))
    layer = randlora.Experts(base, adapter, parameters=parameters, r=r, randlora_alpha=2 * r, **settings)
    return random(layer, seed)


def random(layer, seed=0):
    for i, part in enumerate(layer.adapted()):
        randomize(part, seed + 100 * i)
    return layer


def inputs(top_k, routing="uneven", dtype=torch.float64, tokens=TOKENS):
    """Hidden states, indices and weights; an expert may come once for a token only."""
    hidden = normal(tokens, HIDDEN, seed=60, dtype=dtype).requires_grad_()
    ids = torch.stack([normal(E, seed=70 + i).argsort()[:top_k] for i in range(tokens)])
    if routing == "uneven":  # expert 3 gets no token, expert 2 many
        ids[ids == 3] = 2
    elif routing == "one":
        ids = torch.full((tokens, 1), 4)
    weights = normal(*ids.shape, seed=61, dtype=dtype).abs().requires_grad_()
    return hidden, ids, weights


def parameters_of(layer, adapters=("default",)):
    trained = [part for each in layer.adapted() for part in each.trained_parts()]
    return [part[name] for part in trained for name in adapters if name in part]


def updates(part, adapter="default"):
    """dW of all experts in float64, in the parameter's layout; lambda and gamma get gradients."""
    bases = part.bases[adapter].to(torch.float64)
    lam, gamma = part.randlora_lambda[adapter], part.randlora_gamma[adapter]
    found = [
        reference_dW(bases.A, bases.B, a, b, part.scaling[adapter], part.in_features, part.out_features)
        for a, b in zip(lam, gamma, strict=True)
    ]
    return torch.stack([dW.T if part.fan_in_fan_out else dW for dW in found])


def reference(layer, arguments, adapters=("default",)):
    """What the module computes with weights that have the updates in them, by its own forward, in float64."""
    base = layer.base_layer
    weights = {name: p.detach().double() for name, p in base.named_parameters()}
    for part in layer.adapted():
        for name in adapters:
            if name in part.randlora_lambda:
                weights[part.weight_name] = weights[part.weight_name] + updates(part, name)
    return torch.func.functional_call(base, weights, arguments)
