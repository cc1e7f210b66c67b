"""Ranks that keep no dense bases: each makes its own in every pass, and nothing of them is sent."""

import torch
from helpers.common import randomize
from helpers.models import IDS, net
from helpers.ranks import part_of, shard
from torch.nn.parallel import DistributedDataParallel

import randlora
from randlora.model.parts import adapted_layers

distributed = torch.distributed
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def adapted():
    model = randlora.get_peft_model(net(), randlora.RandLoraConfig(r=3, target_modules=TARGETS))
    layers = adapted_layers(model).values()
    for layer in layers:
        randomize(layer)
    return model, next(iter(layers)).bases["default"]


def gradients(model):
    found = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
            found[name.removeprefix("module.")] = grad
    return found


def trained_in_parallel(folder):
    """DDP: the bytes that travel are those of the gradients. FSDP2: the same gradients. Then rank 0 alone goes on."""
    rank, size = distributed.get_rank(), distributed.get_world_size()
    mine = part_of(IDS)
    model, _ = adapted()
    model(IDS).pow(2).mean().backward()
    expected = gradients(model)

    model, bases = adapted()
    randlora.keep_bases(model, False)
    parallel, sent = DistributedDataParallel(model), []

    def hook(group, bucket):
        sent.append(bucket.buffer().nbytes)
        future = distributed.all_reduce(bucket.buffer().div_(size), group=group, async_op=True).get_future()
        return future.then(lambda future: future.value()[0])

    parallel.register_comm_hook(None, hook)
    parallel(mine).pow(2).mean().backward()
    found = gradients(parallel)
    assert sum(sent) == sum(g.nbytes for g in found.values()) > 0
    assert found.keys() == expected.keys()
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-11, atol=1e-13)
    assert bases.nbytes == 0

    sharded, bases = adapted()
    shard(sharded)
    sharded(mine).pow(2).mean().backward()
    for name, g in gradients(sharded).items():
        torch.testing.assert_close(g, expected[name], rtol=1e-11, atol=1e-13)
    assert bases.nbytes == 0  # the process has one store of this definition

    if rank == 0:  # no other rank is needed to make bases
        with torch.no_grad():
            model(IDS)
        model.save_pretrained(folder)
    return bases.fingerprint()


def test_each_rank_makes_its_own(two_ranks, tmp_path):
    first, second = two_ranks(trained_in_parallel, folder=str(tmp_path))
    assert first == second
    assert (tmp_path / "adapter_model.safetensors").is_file()
