"""Adapters of a model that FSDP2 shards: what is trained, loaded, added up, kept for inference, and what is refused."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from helpers.models import IDS, SETTINGS, Net, adapt, add, net
from helpers.ranks import shard
from torch import nn

import randlora

distributed = torch.distributed
pytest.importorskip("torch.distributed.fsdp")

from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # noqa: E402
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402


def trained(model):
    """Names of the adapters whose parameters require gradients."""
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}


def reshard(model):
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def with_gradients(model):
    reshard(model)
    model.zero_grad()
    model(IDS).sum().backward()
    return {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}


def linears(model):
    return [module for module in model.modules() if isinstance(module, randlora.Linear)]


# ---- which adapters act ----


def switching():
    """Between a call and its backward, too, where the parameters of the root are put together."""
    single = add(adapt(net()), "second", seed=2)
    for model in (shard(copy.deepcopy(single)), fully_shard(copy.deepcopy(single))):
        for put_together in (False, True):
            for name in ("second", "default"):
                if put_together:
                    with torch.no_grad():
                        model(IDS)
                model.set_adapter(name)
                single.set_adapter(name)
                torch.testing.assert_close(model(IDS), single(IDS))
                assert with_gradients(model) == trained(model) == {name}
        model(IDS)
        model.set_requires_grad("second", True)
        assert trained(model) == {"default", "second"}
        model.set_requires_grad("second", False)
        model(IDS)
        with model.disable_adapter(), single.disable_adapter():
            assert trained(model) == set()
            torch.testing.assert_close(model(IDS), single(IDS))
        assert with_gradients(model) == trained(model) == {"default"}
        model.set_adapter(["default", "second"])
        single.set_adapter(["default", "second"])
        torch.testing.assert_close(model(IDS), single(IDS))
        names = ["second", "__base__", "default", "second"]
        torch.testing.assert_close(model(IDS, adapter_names=names), single(IDS, adapter_names=names))
        single.set_adapter("default")


def test_switching_adapters(two_ranks):
    two_ranks(switching)


# ---- adapters that come after fully_shard ----


def message(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except ValueError as error:
        return str(error)
    raise AssertionError("nothing was raised")


def later(folder):
    single = add(adapt(net()), "second", seed=2)
    if distributed.get_rank() == 0:
        single.save_pretrained(folder)
    distributed.barrier()
    config = randlora.RandLoraConfig(**SETTINGS)
    model = shard(adapt(net()))
    model(IDS)
    before = {name for name, _ in model.named_parameters()}
    said = [
        message(model.add_adapter, "second", config),
        message(model.add_adapter, "second", randlora.RandLoraConfig(**SETTINGS, modules_to_save=["head"])),
        message(model.delete_adapter, "default"),
    ]
    assert {name for name, _ in model.named_parameters()} == before and model.peft_config.keys() == {"default"}
    # What is computed with only may come later: each rank has all of it.
    for put_together in (False, True):
        if put_together:
            model(IDS)
        model.load_adapter(Path(folder) / "second", "second")
        said.append(message(model.set_adapter, "second"))
        said.append(message(model.set_requires_grad, "second"))
        assert model.active_adapter == "default" and trained(model) == {"default"}
        model.set_adapter("second", inference_mode=True)
        single.set_adapter("second")
        torch.testing.assert_close(model(IDS), single(IDS))
        model.set_adapter(["default"])
        single.set_adapter("default")
        torch.testing.assert_close(model(IDS), single(IDS))
        model.save_pretrained(Path(folder) / "both")
        distributed.barrier()
        for name in ("", "second"):
            weights = Path(name) / "adapter_model.safetensors"
            assert (Path(folder) / weights).read_bytes() == (Path(folder) / "both" / weights).read_bytes()
        model.delete_adapter("second")
    # A sum has all numbers on each rank.
    model = shard(copy.deepcopy(single))
    model(IDS)
    for part in (model, single):
        part.add_weighted_adapter(["second"], [-0.5], "sum")
        part.set_adapter("sum", inference_mode=True)
    torch.testing.assert_close(model(IDS), single(IDS))
    said.append(message(model.set_adapter, "sum"))
    # A base model that is sharded before it is adapted.
    base = net()
    fully_shard(base.layers[0])
    fully_shard(base)
    said.append(message(randlora.get_peft_model, base, config))
    said.append(message(randlora.RandLoraModel.from_pretrained, base, folder, is_trainable=True))
    assert not linears(base)
    # Layers of their own.
    plain = fully_shard(nn.Sequential(nn.Linear(8, 4)))
    layer = plain[0] = randlora.Linear(plain[0], r=2, init_weights=False)
    assert not any(p.requires_grad for p in plain.parameters())
    said.append(message(layer.set_adapter, "default"))
    layer.update_layer("second", r=2)
    layer.delete_adapter("second")
    assert plain(torch.ones(8)).shape == (4,) and layer.active_adapters == ["default"]
    model = randlora.RandLoraModel.from_pretrained(base, folder)
    assert trained(model) == set()
    single.set_adapter("default")
    torch.testing.assert_close(model(IDS), single(IDS))
    return said


def test_adapters_that_are_added_later(two_ranks, tmp_path):
    said, other = two_ranks(later, folder=str(tmp_path))
    assert said == other
    add, copied, deleted, *others = said
    assert "modules_to_save: a copy of 'head' would not be sharded. Add the adapter before fully_shard" in copied
    assert "'default' cannot be deleted: fully_shard holds its parameters" in deleted
    for text in (add, *others):
        assert "cannot be trained: it was added after fully_shard" in text, text


def biases_later(folder):
    single = adapt(net(), bias="all")
    with torch.no_grad():
        single.model.head.bias.add_(1)
        single.model.layers[1].up_proj.bias.mul_(2)
    if distributed.get_rank() == 0:
        single.save_pretrained(folder)
    distributed.barrier()
    model = adapt(net(), "other")
    for part in (shard(model), fully_shard(adapt(net(), "other"))):
        with torch.no_grad():
            part(IDS)
        part.load_adapter(folder, "default")
        part.set_adapter("default", inference_mode=True)
        torch.testing.assert_close(part(IDS), single(IDS))
    attention = fully_shard(nn.Sequential(nn.MultiheadAttention(8, 2)))
    config = randlora.RandLoraConfig(r=2, target_modules=["0"])
    return message(randlora.get_peft_model, attention, config), message(randlora.MultiheadAttention, attention[0])


def test_biases_are_written_into_their_parts(two_ranks, tmp_path):
    in_a_model, alone = two_ranks(biases_later, folder=str(tmp_path))[0]
    assert "'0': the weights of its attention are sharded" in in_a_model
    assert "base_layer: the weights of its attention are sharded" in alone


# ---- inference and merging ----


def cached():
    model = adapt(net()).eval()
    expected = []
    for factor in (1.0, 0.5):
        with torch.no_grad():
            for p in (p for p in model.parameters() if p.requires_grad):
                p.mul_(factor)
            expected.append(model(IDS))
            for p in (p for p in model.parameters() if p.requires_grad):
                p.div_(factor)
    for whole in (False, True):
        sharded = copy.deepcopy(model)
        sharded = fully_shard(sharded) if whole else shard(sharded, reshard_after_forward=False)
        with torch.no_grad(), randlora.inference_cache() as kept:
            for _ in range(40):
                torch.testing.assert_close(sharded(IDS), expected[0])
                # An accelerator gives new numbers the old memory, and FSDP2 moves no version counter.
                assert kept.nbytes == 0
            reshard(sharded)
            for p in sharded.parameters():
                if p.requires_grad:
                    p.mul_(0.5)
            torch.testing.assert_close(sharded(IDS), expected[1])


def test_nothing_is_kept_for_inference(two_ranks):
    two_ranks(cached)


class Talking(Net):
    def generate(self, ids, words=3):
        for _ in range(words):
            ids = torch.cat([ids, self(ids)[:, -1:].argmax(-1)], 1)
        return ids


def generating():
    single = adapt(Talking().double()).eval()
    expected = single.generate(IDS)
    sharded = shard(copy.deepcopy(single))
    register_fsdp_forward_method(sharded, "generate")
    inner = copy.deepcopy(single)
    fully_shard(inner.model)
    with torch.no_grad():
        assert torch.equal(sharded.generate(IDS), expected)
        assert torch.equal(inner.generate(IDS), expected)


def test_generate(two_ranks):
    two_ranks(generating)


def merging():
    """Of a model, of a model inside one that is sharded, of a layer alone; with parts, and put together."""
    said = []
    model = adapt(net())
    expected = model(IDS).detach()
    for part in (shard(copy.deepcopy(model)), fully_shard(nn.Sequential(copy.deepcopy(model)))):
        inner = next(m for m in part.modules() if isinstance(m, randlora.RandLoraModel))
        for _ in range(2):
            said += [message(inner.merge_adapter), message(inner.merge_and_unload)]
            said += [message(linears(part)[0].merge)]
            assert not any(layer.merged for layer in linears(part)) and len(linears(part)) == 8
            torch.testing.assert_close(part(IDS), expected)
        reshard(part)
        torch.testing.assert_close(part(IDS), expected)
    merged = adapt(net())
    merged.merge_adapter()
    shard(merged)
    torch.testing.assert_close(merged(IDS), expected)
    said.append(message(merged.unmerge_adapter))
    torch.testing.assert_close(merged(IDS), expected)
    return said


def matrices():
    """Of lambda and gamma that are in parts no matrix can be made, on one rank alone least of all."""
    model = shard(adapt(net(), kind="dense"))
    add_one = randlora.Linear(nn.Linear(8, 4), bases=randlora.RandomBases(8, 4, 2, kind="hadamard"), r=2)
    alone = fully_shard(nn.Sequential(add_one))
    layers = linears(model)[0], linears(alone)[0]
    if distributed.get_rank() == 1:
        return []
    return [message(way, "default") for layer in layers for way in (layer.get_delta_weight, layer.get_scaled_bases)]


def test_the_matrix_of_parts_is_refused(two_ranks):
    said = two_ranks(matrices)[0]
    assert len(said) == 4 and all("randlora_lambda['default'] is spread over processes" in text for text in said)


def test_merging_is_refused(two_ranks):
    """What is merged would be lost at the next call."""
    said = two_ranks(merging)[0]
    assert len(said) == 13
    assert "default was merged before fully_shard" in said.pop()
    assert all("is put together by fully_shard for every call" in text for text in said)


# ---- models on meta ----


def on_meta(folder):
    single = adapt(net(), kind="dense")
    if distributed.get_rank() == 0:
        single.save_pretrained(folder)
    distributed.barrier()
    weights = net().state_dict()
    prints = [layer.bases["default"].fingerprint(22, 13, 4) for layer in linears(single)]
    for loaded in (True, False):
        with torch.device("meta"):
            base = Net().double()
        if loaded:
            model = randlora.RandLoraModel.from_pretrained(base, folder, is_trainable=True)
        else:
            model = randlora.get_peft_model(base, randlora.RandLoraConfig(**SETTINGS))
        shard(model).to_empty(device="cpu")
        _load(model, weights)
        assert all(isinstance(p, DTensor) and not p.is_meta for p in model.parameters())
        assert [layer.bases["default"].fingerprint(22, 13, 4) for layer in linears(model)] == prints
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert with_gradients(model) == {"default"}
        expected = single(IDS) if loaded else net()(IDS)
        torch.testing.assert_close(model(IDS), expected)
        for layer in linears(model):
            lam, gamma = (parts["default"] for parts in layer.trained_parts())
            if not loaded:
                assert not lam.full_tensor().any() and gamma.full_tensor().unique() == 1 / max(gamma.shape)
            layer.reset_parameters()
        torch.testing.assert_close(model(IDS), net()(IDS))


def _load(model, weights):
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(
        model.model, {key.replace("_proj.", "_proj.base_layer."): v for key, v in weights.items()}, options=options
    )


def test_models_on_meta(two_ranks, tmp_path):
    """Sharded before they have numbers: bases are made as ever, adapters have those of their file, or new ones."""
    two_ranks(on_meta, folder=str(tmp_path))


def swapped(folder):
    """Each rank takes its parts, with modules to save, biases and another alpha."""
    settings = {"modules_to_save": ["head"], "bias": "randlora_only"}
    single = adapt(net(), seed=8, **settings | {"randlora_alpha": 7})
    with torch.no_grad():
        single.model.head.modules_to_save["default"].weight.mul_(-1)
        single.model.layers[1].up_proj.bias.mul_(2)
    if distributed.get_rank() == 0:
        single.save_pretrained(folder)
    distributed.barrier()
    for wrap in (shard, fully_shard):
        model = wrap(adapt(net(), **settings))
        with torch.no_grad():
            model(IDS)
        reshard(model)
        before = [id(p) for p in model.parameters()]
        model.hotswap(folder)
        assert [id(p) for p in model.parameters()] == before and with_gradients(model) == trained(model)
        torch.testing.assert_close(model(IDS), single(IDS))


def test_another_adapter_in_the_same_parts(two_ranks, tmp_path):
    two_ranks(swapped, folder=str(tmp_path))
