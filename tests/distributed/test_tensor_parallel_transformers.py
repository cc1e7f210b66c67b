"""transformers' own tensor parallel: a model that is cut while it is loaded computes what it computes alone.

Fused experts are refused there; at the end they are replicated and sharded by other engines.
"""

import copy

import pytest
import torch
from helpers.models import IDS, adapt, add, randomize, tiny_llama
from helpers.ranks import part_of
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.names import plain_name

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


# ---- fused experts: FSDP2 and DDP, and plans that are refused ----

EXPERTS = {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def mixture(**changes):
    from helpers.experts_cases import tiny

    return tiny("Mixtral", **changes)


def adapted_mixture(model=None):
    return randomize(randlora.get_peft_model(mixture() if model is None else model, EXPERTS))


def whole_gradients(model, ids):
    model(ids).logits.square().mean().backward()
    found = {
        plain_name(name).removeprefix("module."): p.grad for name, p in model.named_parameters() if p.requires_grad
    }
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in found.items()}


def experts_sharded_and_replicated(folder, parts):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    single = adapted_mixture()
    expected, logits = whole_gradients(copy.deepcopy(single), IDS), single(IDS).logits
    model = copy.deepcopy(single)
    for block in model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    for name, grad in whole_gradients(model, part_of(IDS)).items():  # transformers' norms compute in fp32
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6 * expected[name].abs().max().item())
    with pytest.raises(ValueError, match="fully_shard"):
        model.merge_adapter()
    model.save_pretrained(folder)
    distributed.barrier()
    torch.testing.assert_close(
        randlora.RandLoraModel.from_pretrained(mixture(), folder)(IDS).logits, logits, rtol=2e-6, atol=2e-6
    )

    # All parameters have gradients, also where a rank has no tokens for an expert: nothing need be looked for.
    ddp = DistributedDataParallel(copy.deepcopy(single))
    for name, grad in whole_gradients(ddp, part_of(IDS)).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-6 * expected[name].abs().max().item())

    plain = mixture()
    fully_shard(plain.model.layers[0])
    before = [type(module) for module in plain.modules()]
    with pytest.raises(ValueError, match="sharded: fully_shard would not know"):
        randlora.get_peft_model(plain, EXPERTS)
    assert [type(module) for module in plain.modules()] == before

    for parallel in ({"tp_size": 2}, {"tp_size": 2, "ep_size": 2}):
        cut = AutoModelForCausalLM.from_pretrained(
            parts, dtype=torch.float64, distributed_config=DistributedConfig(**parallel)
        )
        with pytest.raises((TypeError, ValueError), match="spread over ranks by a parallel plan"):
            randlora.get_peft_model(cut, EXPERTS)


def test_experts_have_the_gradients_of_one_process(two_ranks, tmp_path):
    pytest.importorskip("transformers.integrations.moe")
    mixture(num_local_experts=4).save_pretrained(tmp_path / "plain")
    two_ranks(experts_sharded_and_replicated, folder=str(tmp_path / "adapter"), parts=str(tmp_path / "plain"))
