"""What PEFT's RandLoRA (0.21.2) does badly or wrongly, and what this package does instead, for whole models.

Each test names in one line what PEFT does; test_upstream.py looks whether it still does. What other modules test:

| fact | PEFT | tested by |
|---|---|---|
| 2 | keeps the scaled base and casts of B | ops/test_saved_bytes.py::test_every_strategy_keeps_the_input_alone |
| 3 | keeps one fp32 copy of the input per layer | ops/test_saved_bytes.py::test_four_blocks_keep_four_inputs |
| 4 | builds full-size temporaries in backward | test_memory.py::test_peak_is_the_result |
| 8 | writes the bases once per layer plus once | checkpoint/test_saving.py::test_projections_are_written_once |
| 9 | merges wrongly into 8 and 4 bits | layers/test_quantized_merge.py::test_merge_and_unmerge |
| 10 | gives fp32 for bf16 beside quantised weights | layers/test_quantized_forward.py::test_forward_and_gradients |
| 11 | nests wrappers of quantised layers | layers/test_quantized_forward.py::test_a_second_adapter_nests_nothing |
| 14 | ignores adapter_names | layers/test_mixed_batch.py::test_forward |
| 15 | draws in bf16 or fp16 by the machine | bases/test_peft.py::test_values_of_peft |
| 17 | documents another very_sparse than it draws | bases/test_peft.py::test_very_sparse_density_is_pefts |
"""

import copy
import re
from pathlib import Path

import pytest
import torch
from helpers.models import IDS, adapt, add, layers_of, merged_by_hand, net, randomize, tiny_llama
from torch import nn
from torch.testing import assert_close

import randlora
from randlora import RandLoraConfig, RandLoraModel


def test_the_table():
    rows = re.findall(r"^\| (\d+) \|.*\| (\S+\.py)::(\w+) \|$", __doc__, re.MULTILINE)
    for _, file, test in rows:
        assert f"def {test}(" in (Path(__file__).resolve().parents[2] / file).read_text(), (file, test)
    here = re.findall(r"^def test_fact_(\d+)", Path(__file__).read_text(), re.MULTILINE)
    assert {int(number) for number, *_ in rows} | {int(n) for n in here} == set(range(1, 19))


def test_fact_1_bases_of_a_16_bit_model_are_held_in_16_bits():
    """PEFT turns the bases into fp32, and computes every adapter product in fp32."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
    model = adapt(net(torch.bfloat16), projection_prng_key=101, **settings)
    saved = []
    linear = model.model.layers[0].q_proj
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        assert linear(torch.ones(3, 13, dtype=torch.bfloat16)).dtype == torch.bfloat16
    own = {p.data_ptr() for p in linear.parameters()}  # lambda and gamma stay fp32
    assert {t.dtype for t in saved if t.data_ptr() not in own} == {torch.bfloat16}
    bases = linear.bases["default"]
    # max_dim 22, min_dim 13, n = r = 4: A and B in two bytes each, and no other copy
    assert bases.nbytes == 2 * (4 * 13 + 22 * 4 * 4)


def test_fact_5_bases_are_as_large_as_a_layer_needs():
    """PEFT takes the largest in and out dimensions apart: four times too much for 64 -> 256 beside 256 -> 64."""
    plain = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    settings = {"r": 8, "target_modules": ["0", "1"], "projection_prng_key": 102}
    model = randlora.get_peft_model(plain, settings)
    bases = model.model[0].bases["default"]
    assert bases is model.model[1].bases["default"]
    assert (bases.max_dim, bases.min_dim, bases.num_bases) == (256, 64, 8)


def test_fact_6_other_devices_get_one_copy():
    """PEFT copies the bases over at every step of every layer on another device. Here meta stands for that device."""
    model = adapt(net(), projection_prng_key=103)
    bases = model.model.layers[0].q_proj.bases["default"]
    model(IDS)
    assert model.to("meta")(IDS.to("meta")).is_meta
    first = bases.tensors(torch.float64, torch.device("meta"))
    assert all(t.is_meta for t in first)
    model(IDS.to("meta"))
    assert all(a is b for a, b in zip(first, bases.tensors(torch.float64, torch.device("meta")), strict=True))
    assert bases.nbytes == 2 * 8 * (4 * 13 + 22 * 4 * 4)  # one copy for each of the two devices


def test_fact_7_decoding_builds_an_update_once(monkeypatch):
    """PEFT rebuilds the scaled base of every layer for every token."""
    model = adapt(tiny_llama(), target_modules=["q_proj", "v_proj"])
    built = []
    original = randlora.Linear.get_delta_weight
    monkeypatch.setattr(
        randlora.Linear, "get_delta_weight", lambda self, name: built.append(name) or original(self, name)
    )
    settings = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    first = model.generate(IDS, **settings)
    assert len(built) == len(layers_of(model))
    assert torch.equal(first, model.generate(IDS, **settings))


def test_fact_12_ranks_side_by_side():
    """PEFT has one num_bases and one pair of bases per layer: adapters of two ranks break each other."""
    settings = [{"r": 8, "target_modules": ["q_proj"]}, {"r": 4, "target_modules": ["q_proj"]}]
    model = adapt(net(), **settings[0])
    before = model(IDS)
    add(model, "b", 2, **settings[1])
    assert torch.equal(model(IDS), before)


@pytest.mark.parametrize("second", [{"sparse": True}, {"target_modules": ["q_proj", "up_proj"]}], ids=str)
def test_fact_13_the_second_adapter_has_bases_of_its_own(second, tmp_path):
    """PEFT silently uses the first's; loaded alone later, the adapter computes something else."""
    first = {"r": 4, "target_modules": ["q_proj"]}
    model = adapt(net(), **first)
    add(model, "b", 2, **first | second)
    model.save_pretrained(tmp_path, ["b"])
    model.set_adapter("b")
    assert_close(model(IDS), merged_by_hand(net(), model, ["b"])(IDS), rtol=1e-11, atol=1e-11)
    assert torch.equal(RandLoraModel.from_pretrained(net(), tmp_path / "b")(IDS), model(IDS))


def test_fact_14_a_batch_of_mixed_adapters():
    """PEFT ignores adapter_names."""
    model = adapt(net(), target_modules=["q_proj"])
    got = model(IDS, adapter_names=["default", "__base__"] * 2)
    assert torch.equal(got[1::2], net()(IDS)[1::2]) and not torch.allclose(got[::2], net()(IDS)[::2])


def test_fact_16_16_bit_weights_come_back():
    """PEFT subtracts what it added, with two roundings."""
    model = adapt(net(torch.bfloat16), target_modules="all-linear", randlora_alpha=40)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.merge_adapter()
    assert not torch.equal(model.model.head.weight, before["model.head.base_layer.weight"])
    model.unmerge_adapter()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_fact_18_torch_func():
    """PEFT's autograd function has no setup_context, so that torch.func transforms raise."""
    model = adapt(net(), target_modules=["q_proj", "down_proj"]).train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters, ids):
        return torch.func.functional_call(model, parameters, (ids[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, IDS)
    model(IDS).square().sum().backward()
    for name, p in parameters.items():
        assert_close(per_sample[name].sum(0), p.grad)


def test_configs_and_models_are_not_shared_between_these_tests():
    """What the comparisons above rest on: equal weights at every call, and adapters that act."""
    assert torch.equal(net()(IDS), net()(IDS))
    twin = copy.deepcopy(adapt(net()))
    assert not torch.allclose(twin(IDS), net()(IDS))
    assert torch.equal(randomize(twin)(IDS), adapt(net())(IDS))
    assert RandLoraConfig(r=4) == RandLoraConfig(r=4)
