"""What PEFT's RandLoRA itself does, where our documentation says so (0.16 to 0.21.2).

Tests with the marker `upstream` are about another package alone: PEFT, transformers or PyTorch, and nothing of ours
runs in them but helpers. One that fails with a new version means that a page of docs/, or the reason that an error of
ours gives, has become wrong: read what the test names, change that, and change or remove the test.
``pytest -m upstream`` runs them alone, ``pytest -m "not upstream"`` leaves them out.

The numbers are the facts of docs/peft.md; test_defects.py has what this package does instead.
"""

import warnings

import pytest
import torch
from helpers.models import IDS, net
from torch import nn

peft = pytest.importorskip("peft")
pytest.importorskip("transformers")
from helpers.peft_models import adapt, bases, config, llama, logits  # noqa: E402

pytestmark = pytest.mark.upstream


def adapted(model, *settings):
    """PEFT's model with adapters default, b, ..."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = [peft.RandLoraConfig(**setting) for setting in settings]
        found = peft.get_peft_model(model, configs[0])
        for name, other in zip("bc", configs[1:], strict=False):
            found.add_adapter(name, other)
    return found


def test_fact_1_bases_of_a_16_bit_model_become_fp32():
    model = adapted(net(torch.bfloat16), {"r": 4, "target_modules": ["q_proj", "down_proj"]})
    assert model.base_model.randlora_B["default"].dtype == torch.float32


def test_fact_5_bases_are_sized_by_other_layers_dimensions():
    """Four times as large as any of these layers needs."""
    plain = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    model = adapted(plain, {"r": 8, "target_modules": ["0", "1"], "projection_prng_key": 102})
    assert model.base_model.randlora_B["default"].numel() == 4 * 256 * 8 * 8


def test_fact_12_adapters_of_two_ranks_break_each_other():
    model = adapted(net(torch.float32), *({"r": r, "target_modules": ["q_proj"]} for r in (8, 4)))
    model.set_adapter("b")
    with pytest.raises(RuntimeError, match=r"[Ss]ize|shape"):
        model(IDS)


@pytest.mark.parametrize("second", [{"sparse": True}, {"target_modules": ["q_proj", "up_proj"]}], ids=str)
def test_fact_13_a_second_adapter_has_the_firsts_bases(second):
    """Not those that it has where it is loaded alone."""
    first = {"r": 4, "target_modules": ["q_proj"]}
    beside = adapted(net(torch.float32), first, first | second)
    alone = adapted(net(torch.float32), first | second)
    found = beside.base_model.model.layers[0].q_proj.randlora_B
    assert "b" not in found or not torch.equal(found["b"], alone.base_model.randlora_B["default"])


def test_facts_12_and_13_of_a_language_model():
    targets = "q_proj", "v_proj", "down_proj"
    model = adapt(llama(), config(*targets, r=8), False)
    model.add_adapter("other", config(*targets, r=8, sparse=True))
    assert bases(model, "other")[0] is bases(model)[0]
    model.add_adapter("rank", config(*targets, r=4))
    with pytest.raises(RuntimeError, match=r"[Ss]ize|shape"):
        logits(model)


def test_fact_14_names_of_adapters_for_the_samples_are_ignored():
    model = adapted(net(torch.float32), {"r": 4, "target_modules": ["q_proj"], "init_weights": False})
    assert torch.equal(model(IDS, adapter_names=["__base__"] * 4), model(IDS))
    assert not torch.equal(model(IDS), net(torch.float32)(IDS))
    model = adapt(llama(), config("q_proj"), False).eval()
    assert torch.equal(logits(model, adapter_names=["__base__"] * 3), logits(model))


def test_fact_16_16_bit_weights_do_not_come_back():
    model = adapted(net(torch.bfloat16), {"r": 4, "target_modules": ["q_proj"], "init_weights": False})
    weight = model.base_model.model.layers[0].q_proj.base_layer.weight
    kept = weight.clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(weight, kept)


def test_fact_18_torch_func_fails():
    model = adapted(net(torch.float32), {"r": 4, "target_modules": ["q_proj"]})
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (IDS,)).sum()

    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(loss)(trained)


def test_a_tied_layer_is_adapted_once():
    """The reason that randlora.checkpoint.for_peft gives where it refuses such a model."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = self.second = nn.Linear(8, 8)

    model = adapted(Tied(), {"r": 4, "target_modules": ["first"]}).base_model.model
    assert model.first is not model.second
