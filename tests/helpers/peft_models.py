"""Small models that PEFT adapts, as PEFT leaves them and accelerated, with equal and random parameters."""

import copy

import peft
import torch
from peft.tuners import randlora as peft_randlora
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

import randlora.integrations.peft as integration
from helpers.common import make_base, normal

version = tuple(int(part) for part in peft.__version__.split(".")[:2])
KINDS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}


def state_of_peft():
    """Everything in PEFT's RandLoRA that could have been replaced."""
    modules = peft, peft.tuners, peft_randlora, peft_randlora.model, peft_randlora.layer, peft.mapping, peft.peft_model
    modules += peft.utils, peft.utils.save_and_load
    classes = peft_randlora.layer.Linear, peft_randlora.RandLoraLayer, peft.tuners.tuners_utils.BaseTuner
    found = [dict(vars(thing)) for thing in (*modules, *classes, peft.PeftModel)]
    for names in found:
        names.pop("__warningregistry__", None)
    return found, dict(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING)


def config(*targets, **arguments):
    arguments = {"r": 5, "randlora_alpha": 7, **arguments}
    return peft.RandLoraConfig(target_modules=list(targets), **arguments)


def randomize(model, seed=0):
    """Random lambda and gamma for every adapter of a PEFT model; the same in each model of the same architecture."""
    with torch.no_grad():
        for i, (name, parameter) in enumerate(model.named_parameters()):
            if "randlora_lambda" in name:
                parameter.copy_(normal(*parameter.shape, seed=seed + i))
            if "randlora_gamma" in name:
                parameter.copy_(normal(*parameter.shape, seed=seed + i) / parameter.shape[1] ** 0.5 / 5)
    return model


def adapt(model, config, accelerated=True, **arguments):
    """PEFT's model around a copy of `model`, with random parameters."""
    model, config = copy.deepcopy((model, config))
    if not accelerated:
        return randomize(peft.get_peft_model(model, config, **arguments))
    with integration.enable():
        return randomize(peft.get_peft_model(model, config, **arguments))


def both(model, config, **arguments):
    """PEFT's own model and the accelerated one."""
    return adapt(model, config, False, **arguments), adapt(model, config, **arguments)


class Layers(nn.Module):
    """Linear layers by name, called one after the other."""

    def __init__(self, **layers):
        super().__init__()
        self.names = list(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return x


def layers(dtype=torch.float32, **shapes):
    return Layers(**{name: make_base(*shape, dtype=dtype) for name, shape in shapes.items()})


def conv1d(in_features, out_features, dtype=torch.float32):
    layer = Conv1D(out_features, in_features).to(dtype)
    with torch.no_grad():
        layer.weight.copy_(normal(in_features, out_features, seed=4))
        layer.bias.copy_(normal(out_features, seed=5))
    return Layers(layer=layer)


def llama(dtype=torch.float32, layers=2):
    """Of the size of a toy, with grouped keys, so that no two kinds of its linear layers have one shape."""
    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 41, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape["initializer_range"] = 0.2  # so that adapting its layers changes what it says
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=layers, **shape)).to(dtype)


def tokens(batch=3, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (batch, length), generator=generator)


def logits(model, ids=None, **arguments):
    with torch.no_grad():
        return model(input_ids=tokens() if ids is None else ids, **arguments).logits


def bases(model, adapter="default"):
    return model.base_model.randlora_A[adapter], model.base_model.randlora_B[adapter]


def tied_llama():
    settings = llama().config
    settings.tie_word_embeddings = True
    torch.manual_seed(0)
    return LlamaForCausalLM(settings)


def broken(model, which=-1):
    with torch.no_grad():
        adapted(model)[which].randlora_lambda["default"][0, 0] = torch.nan
    return model


def adapted(model):
    return [module for module in model.modules() if hasattr(module, "randlora_lambda")]


def state(model):
    """All that an operation may change, tensors by value and identity of parameters."""
    noted = ("_update_cache", "_was_called", "_was_read", "_is_bypassed", "_seen_calls")  # of calls
    modules = {name: (type(m), sorted(set(vars(m)).difference(noted))) for name, m in model.named_modules()}
    adapters = {
        name: (m.active_adapters, m.merged_adapters[:], sorted(m.bases), m.disable_adapters)
        for name, m in model.named_modules()
        if hasattr(m, "randlora_lambda") and hasattr(m, "bases")
    }
    parameters = {name: (p, p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}
    tied = getattr(getattr(model, "config", None), "tie_word_embeddings", None)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    return modules, adapters, parameters, tied, dict(getattr(model, "peft_config", {})), values


def assert_unchanged(model, before):
    after = state(model)
    for i in (0, 1, 3, 4):
        assert after[i] == before[i]
    assert after[2].keys() == before[2].keys()
    for name, (parameter, flag) in before[2].items():
        assert after[2][name][0] is parameter and after[2][name][1] == flag, name
    assert after[5].keys() == before[5].keys()
    for name, value in before[5].items():
        torch.testing.assert_close(after[5][name], value, rtol=0, atol=0, equal_nan=True)
