"""What differs between ranks is found at start and named on all of them; nothing waits for ranks that do not come."""

import os
from unittest import mock

import pytest
import torch
from helpers.common import make_base, make_bases, normal
from helpers.models import IDS, SETTINGS, adapt, add, net
from helpers.ranks import shard
from torch import nn

import randlora
from randlora.distributed import agreement, check_ranks

distributed = torch.distributed


def raised(function, *arguments):
    """The message of the error that `function` raises, or None."""
    try:
        function(*arguments)
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def refused(answers, *words):
    """Every rank raised the same error, with these words."""
    assert answers[0] is not None and len(set(answers)) == 1, answers
    for word in words:
        assert word in answers[0], (word, answers[0])


# ---- check_ranks ----


def settings_of_rank(changes):
    model = adapt(net(), **(changes if distributed.get_rank() else {"kind": "dense"}))
    return raised(check_ranks, model)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"projection_prng_key": 7}, "projection_prng_key of adapter 'default' is 0 on rank 0, 7 on rank 1"),
        ({"kind": "hadamard"}, "kind of adapter 'default' is 'dense' on rank 0, 'hadamard' on rank 1"),
        ({"r": 3}, "r of adapter 'default' is 4 on rank 0, 3 on rank 1"),
        ({"randlora_alpha": 6}, "randlora_alpha of adapter 'default' is 3 on rank 0, 6 on rank 1"),
        ({"randlora_dropout": 0.5}, "randlora_dropout of adapter 'default' is 0.0 on rank 0, 0.5 on rank 1"),
        ({"prng": "peft"}, "prng of adapter 'default' is 'philox' on rank 0, 'peft' on rank 1"),
        ({"target_modules": ["q_proj"]}, "target_modules of adapter 'default' is ["),
    ],
)
def test_settings_that_differ_are_named(two_ranks, changes, words):
    refused(two_ranks(settings_of_rank, changes=changes), words)


def many_cases():
    """One after the other, as each is a collective: name -> message."""
    rank = distributed.get_rank()
    here = {}

    model = adapt(net())
    if rank:
        add(model, "second", seed=2)
    here["adapters"] = raised(check_ranks, model)

    model = adapt(net())
    add(model, "second", seed=2)
    if rank:
        model.set_adapter("second")
    here["active"] = raised(check_ranks, model)

    model = adapt(net())
    if rank:
        model.model.layers[1].up_proj.scaling["default"] *= 2
    here["one layer"] = raised(check_ranks, model)

    for what, seeds in (("values", (1, 2)), ("same values", (1, 1))):
        A, B = normal(5, 1, 24, seed=seeds[rank]), normal(41, 5, 5, seed=3)
        layer = randlora.Linear(make_base(41, 24), r=5, randlora_A=A, randlora_B=B)
        here[f"given {what}"] = raised(check_ranks, nn.Sequential(layer))
    # Nobody made a model of this.
    layer = randlora.Linear(make_base(41, 24), r=5, bases=make_bases(41, 24, 5, seed=rank))
    here["by hand"] = raised(check_ranks, nn.parallel.DistributedDataParallel(nn.ModuleDict({"a": layer})))

    here["nothing"] = raised(check_ranks, nn.Linear(2, 2))
    here["nothing on one"] = raised(check_ranks, adapt(net()) if rank else net())
    here["no module"] = raised(check_ranks, "model")

    broken = adapt(net())
    if rank:
        del broken.model.layers[0].q_proj.scaling["default"]
    here["broken on one"] = raised(check_ranks, broken)
    return here


def test_what_else_differs_is_named(two_ranks):
    answers = two_ranks(many_cases)
    found = {case: [answer[case] for answer in answers] for case in answers[0]}
    refused(found["adapters"], "adapters is ['default'] on rank 0, ['default', 'second'] on rank 1", "more differences")
    refused(found["active"], "activity of adapter 'default' at 'model.layers.0.q_proj' is 'active' on rank 0, 'not act")
    refused(found["one layer"], "scaling of adapter 'default' at 'model.layers.1.up_proj' is 0.75 on rank 0, 1.5 on r")
    refused(found["given values"], "bases of adapter 'default' at '0' is 'given, SHA-256 ", "on rank 0, 'given, SHA-2")
    refused(found["by hand"], "bases of adapter 'default' at 'a' is", "seed=0", "seed=1")
    refused(found["nothing"], "Linear has no adapted layers on any rank")
    refused(found["nothing on one"], "adapters is missing on rank 0, ['default'] on rank 1")
    refused(found["no module"], "TypeError: model must be a torch.nn.Module, got str")
    refused(found["broken on one"], "description of the adapters is missing on rank 0", "failed with KeyError")
    assert found["given same values"] == [None, None]


def what_may_differ():
    """Ranks that agree, although they are not the same in everything."""
    rank = distributed.get_rank()
    if rank:  # the store that layers share has grown there
        larger = randlora.Linear(nn.Linear(90, 70), r=4)
    names = SETTINGS["target_modules"]
    model = adapt(net(), target_modules=names[::-1] if rank else names, base_model_name_or_path=f"/disk{rank}")
    torch.manual_seed(rank)
    with torch.no_grad():
        model.model.head.weight.copy_(torch.randn(7, 13))
    model.model.layers[0].q_proj.workspace = rank
    grown = model.model.layers[0].q_proj.bases["default"].max_dim
    answers = [raised(check_ranks, model), raised(check_ranks, torch.compile(model, backend="eager"))]
    answers += [raised(check_ranks, nn.parallel.DistributedDataParallel(model)), raised(check_ranks, model)]
    if rank:
        assert larger.bases["default"] is model.model.layers[0].q_proj.bases["default"]
    return grown, answers


def test_ranks_may_differ_in_what_does_not_count(two_ranks):
    (grown, answers), (grown_more, others) = two_ranks(what_may_differ)
    assert answers == others == [None] * 4 and (grown, grown_more) == (22, 90)


def groups():
    rank = distributed.get_rank()
    model = adapt(net(), projection_prng_key=rank)
    alone = [distributed.new_group([0]), distributed.new_group([1])]
    return {
        "column": raised(check_ranks, model, distributed.device_mesh.init_device_mesh("cpu", (2, 1))),
        "row": raised(check_ranks, model, distributed.device_mesh.init_device_mesh("cpu", (1, 2))),
        "all": raised(check_ranks, model, distributed.group.WORLD),
        "mine": raised(check_ranks, model, alone[rank]),
        "not mine": raised(check_ranks, model, alone[1 - rank]),
    }


def test_groups_and_meshes(two_ranks):
    answers = two_ranks(groups)
    for what in ("column", "row", "all"):
        refused([answer[what] for answer in answers], "projection_prng_key of adapter 'default' is 0 on rank 0, 1 on r")
    for rank, answer in enumerate(answers):
        assert answer["mine"] is None and f"rank {rank} is not in the process group" in answer["not mine"]


def test_one_process_has_nothing_to_compare():
    assert not distributed.is_initialized()
    assert check_ranks(adapt(net())) is None


# ---- by itself ----


def comparisons(function):
    """How many exchanges between the ranks `function` starts to compare them."""
    count, gathered = [0], agreement.exchanged

    def counting(*arguments):
        count[0] += 1
        return gathered(*arguments)

    with mock.patch.object(agreement, "exchanged", counting):
        function()
    return count[0]


def step(model):
    model(IDS).square().sum().backward()


def first_step(seed, wrap):
    model = adapt(net(), projection_prng_key=seed * distributed.get_rank())
    if wrap == "fsdp":
        engine = shard(model)
    elif wrap == "tensor parallel":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        plan = {"*.up_proj.base_layer": ColwiseParallel(), "*.down_proj.base_layer": RowwiseParallel()}
        parallelize_module(model.model.layers, distributed.device_mesh.init_device_mesh("cpu", (2,)), plan)
        engine = model
    else:
        engine = nn.parallel.DistributedDataParallel(model, find_unused_parameters=wrap == "unused")
    if seed:
        with torch.no_grad():
            engine(IDS)
        return raised(step, engine)
    return [comparisons(lambda: step(engine)) for _ in range(3)]


@pytest.mark.parametrize("wrap", ["ddp", "unused", "fsdp", "tensor parallel"])
def test_the_first_training_step_compares(two_ranks, wrap):
    refused(two_ranks(first_step, seed=5, wrap=wrap), "projection_prng_key of adapter 'default' is 0 on rank 0, 5 on")
    for counts in two_ranks(first_step, seed=0, wrap=wrap):
        assert counts == [1, 0, 0]


class Branching(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.always, self.sometimes = model, nn.Linear(2, 2)

    def forward(self, ids, whether):
        return self.always(ids) if whether else self.sometimes(ids[:, :2].double().float())


def where_ranks_may_be_alone(folder):
    """Nothing here waits for the other rank, which has other bases and would be told."""
    rank = distributed.get_rank()
    model = adapt(net(), projection_prng_key=rank)
    ddp = nn.parallel.DistributedDataParallel(model)
    if rank == 0:
        model.save_pretrained(folder)
        model(IDS)  # not through the wrapper
        with torch.no_grad():
            ddp(IDS)
            ddp.eval()(IDS)
        ddp.train()
        with ddp.no_sync():
            step(ddp)
    distributed.barrier()

    agreeing = adapt(net())
    uneven = nn.parallel.DistributedDataParallel(agreeing)
    with uneven.join():
        for _ in range(1 + rank):
            step(uneven)

    branching = nn.parallel.DistributedDataParallel(Branching(adapt(net())), find_unused_parameters=True)
    branching(IDS, whether=rank == 0).sum().backward()
    return os.listdir(folder)


def test_nothing_waits_where_a_rank_may_be_alone(two_ranks, tmp_path):
    for files in two_ranks(where_ranks_may_be_alone, folder=str(tmp_path)):
        assert sorted(files) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_layers_of_peft_are_described():
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft

    with randlora.integrations.peft.enable():
        first, same, other = (
            peft.get_peft_model(
                net(torch.float32),
                peft.RandLoraConfig(r=4, target_modules=["q_proj", "up_proj"], projection_prng_key=seed),
            )
            for seed in (1, 1, 2)
        )
    described = agreement.describe(first)
    assert described == agreement.describe(same)
    different = {field for field, value in agreement.describe(other).items() if described[field] != value}
    paths = [f"base_model.model.layers.{i}.{name}" for i in range(2) for name in ("q_proj", "up_proj")]
    expected = {f"bases of adapter 'default' at {path!r}" for path in paths}
    assert different == {"projection_prng_key of adapter 'default'", *expected}


def test_peft_compares_at_the_first_step(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    import randlora.integrations.peft
    from randlora.distributed import first_step as looking

    compared = []
    monkeypatch.setattr(looking, "compare", lambda model, group: compared.append(model))
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with randlora.integrations.peft.enable():
            model = peft.get_peft_model(net(torch.float32), peft.RandLoraConfig(r=4, target_modules=["q_proj"]))
        ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        for _ in range(2):
            step(ddp)
    finally:
        distributed.destroy_process_group()
    assert compared == [model.base_model]
