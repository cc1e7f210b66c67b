"""transformers' own tensor parallel: a model that is cut while it is loaded computes what it computes alone."""

import pytest
import torch
from helpers.models import IDS, adapt, add, tiny_llama

import randlora

distributed = torch.distributed
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("transformers.distributed.tensor_parallel")
    path = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(path)
    return str(path)


def load(folder, parallel):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    options = {"distributed_config": DistributedConfig(tp_size=2)} if parallel else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def trained_and_saved(folder, out):
    models = []
    for parallel in (False, True):
        model = adapt(load(folder, parallel), target_modules=ALL, kind="dense")
        models.append(add(model, "other", seed=2, target_modules=["q_proj", "down_proj"], kind="hadamard"))
    alone, model = models
    assert model.model.model.layers[0].self_attn.q_proj.weight.placements[0].is_shard(0)
    assert (model.tp_size, model.tp_plan) == (2, model.model.tp_plan)  # what Trainer looks at

    expected, found = (m(IDS, labels=IDS) for m in models)
    close(found.logits, expected.logits)
    for output in (expected, found):
        output.loss.backward()
    grads = [{name: p.grad for name, p in m.named_parameters() if p.requires_grad} for m in models]
    assert len(grads[0]) == 28 and grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        close(grads[1][name], grad)

    for m, name in zip(models, ("alone", "parallel"), strict=True):
        m.save_pretrained(f"{out}/{name}{distributed.get_rank()}")
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.01).step()
        m.eval()
        m.zero_grad()
    with torch.no_grad():
        close(model(IDS).logits, alone(IDS).logits)
        names = ["default", "__base__", "other", "default"]
        close(model(IDS, adapter_names=names).logits, alone(IDS, adapter_names=names).logits)
        with model.disable_adapter(), alone.disable_adapter():
            close(model(IDS).logits, alone(IDS).logits)
    words = [m.generate(IDS, max_new_tokens=5, do_sample=False) for m in models]
    assert torch.equal(*words)

    model.save_pretrained(f"{out}/stepped{distributed.get_rank()}")
    again = randlora.RandLoraModel.from_pretrained(load(folder, True), f"{out}/stepped{distributed.get_rank()}")
    with torch.no_grad():
        close(again(IDS).logits, alone(IDS).logits)
        for m in models:
            m.merge_adapter()
        close(model(IDS).logits, alone(IDS).logits)
        for m in models:
            m.unmerge_adapter()
        close(model.merge_and_unload()(IDS).logits, alone.merge_and_unload()(IDS).logits)


def test_all_of_a_model(two_ranks, folder, tmp_path):
    two_ranks(trained_and_saved, folder=folder, out=str(tmp_path))
    same = [("alone0", "parallel0", "parallel1"), ("stepped0", "stepped1")]
    for names in same:
        assert len({(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in names}) == 1, names


def copies(folder):
    model = load(folder, True)
    with pytest.raises(ValueError, match="a copy of it would call the original"):
        adapt(model, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not any(p.startswith("randlora") for p in model.state_dict())


def test_a_copy_that_would_not_be_called_is_refused(two_ranks, folder):
    two_ranks(copies, folder=folder)


def of_peft(folder):
    import peft

    import randlora.integrations.peft

    results = []
    for parallel in (False, True):
        torch.manual_seed(0)
        config = peft.RandLoraConfig(r=4, randlora_alpha=8, target_modules=ALL, init_weights=False)
        model = peft.get_peft_model(load(folder, parallel), config)
        randlora.integrations.peft.accelerate(model)
        output = model(IDS, labels=IDS)
        output.loss.backward()
        results.append([output.logits, *(p.grad for p in model.parameters() if p.requires_grad)])
    for expected, found in zip(*results, strict=True):
        close(found, expected)


def test_accelerated_layers_of_peft(two_ranks, folder):
    pytest.importorskip("peft")
    two_ranks(of_peft, folder=folder)
