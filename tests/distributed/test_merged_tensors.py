"""``model.merged_tensors()`` of models that several processes hold in parts: whole, on all of them."""

import copy

import pytest
import torch
from helpers.models import IDS, adapt, add, net, randomize
from helpers.ranks import shard

import randlora

pytest.importorskip("torch.distributed.fsdp")

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from randlora.distributed.gathering import is_dtensor, whole
from randlora.export import to_merged


def everything():
    """Of the root itself, which stays put together after a call, the head is adapted, and the embeddings are saved."""
    model = adapt(net(), modules_to_save=["embed"], bias="all", target_modules=["q_proj", "up_proj", "head"])
    model = add(model, "second", 2, target_modules=["q_proj"])
    with torch.no_grad():
        model.model.embed.modules_to_save["default"].weight.add_(0.5)
    model.set_adapter(["default", "second"])
    return model


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert type(got[name]) is torch.Tensor and got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


def sharded():
    expected = copy.deepcopy(everything()).merge_and_unload().state_dict()
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(param_dtype=torch.float32)):
        model = shard(everything(), mp_policy=policy)
        assert_same(dict(model.merged_tensors()), expected)
        output = model(IDS)  # the root's parameters stay put together
        assert_same(dict(model.merged_tensors()), expected)
        assert torch.equal(model(IDS), output)
        found = {}
        for name, tensor in model.merged_tensors():
            found[name] = tensor
            model(IDS)
        assert_same(found, expected)
    with pytest.raises(ValueError, match="save the adapter, and export its folder"):
        to_merged(model, "nowhere")
    one_by_one = everything()
    for layer in list(one_by_one.modules()):
        if type(layer) is torch.nn.Linear:
            fully_shard(layer)
    assert_same(dict(one_by_one.merged_tensors()), expected)


def test_sharded_by_fsdp2(two_ranks):
    two_ranks(sharded)


def sharded_experts():
    from helpers.experts_cases import tiny

    config = {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    model = randomize(randlora.get_peft_model(tiny("Qwen3Moe"), config))
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    for block in model.model.model.layers:
        fully_shard(block)
    fully_shard(model)
    assert_same(dict(model.merged_tensors()), expected)
    found = dict(model.merged_tensors(original_names=True))
    first = expected["model.layers.1.mlp.experts.down_proj"][0]
    assert torch.equal(found["model.layers.1.mlp.experts.0.down_proj.weight"], first)


def test_fused_experts_sharded_by_fsdp2(two_ranks):
    pytest.importorskip("transformers.integrations.moe")
    two_ranks(sharded_experts)


def cut():
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def model():
        return adapt(net(), target_modules=["up_proj", "down_proj", "q_proj"])

    alone = copy.deepcopy(model()).merge_and_unload().state_dict()
    parallel, mesh = model(), init_device_mesh("cpu", (2,))
    for block in parallel.model.layers:
        plan = {"up_proj.base_layer": ColwiseParallel(), "down_proj.base_layer": RowwiseParallel()}
        parallelize_module(block, mesh, plan | {"v_proj": ColwiseParallel()})
    got = dict(parallel.merged_tensors())
    for name, tensor in alone.items():  # every rank has made its own part, with products of other sizes
        torch.testing.assert_close(got[name], tensor, rtol=1e-13, atol=1e-13)
    found = parallel.merge_and_unload().state_dict()
    assert any(map(is_dtensor, found.values()))
    assert_same(got, {name: whole(tensor) for name, tensor in found.items()})


def test_tensor_parallel(two_ranks):
    two_ranks(cut)
