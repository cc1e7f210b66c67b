"""Tensor parallel on four ranks: uneven and empty shards, and meshes of two dimensions."""

import pytest
import torch
from helpers.common import normal
from helpers.models import IDS, adapt, net
from helpers.tensor_parallel import adapted, assert_equal, call, mesh, parallelize, same_as_alone
from torch import nn

distributed = torch.distributed


def test_shards_of_any_size(four_ranks):
    """Of 5 rows on four ranks one gets none, of 3 columns as well."""
    four_ranks(
        same_as_alone,
        cases=[
            {"into": into, "out": out, "way": way, "kinds": [kind], "whole": kind == "dense"}
            for into, out in ((5, 9), (9, 5), (3, 3))
            for way in ("columns", "rows")
            for kind in ("dense", "hadamard", "sparse")
        ],
    )


def square():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def with_weight(placements, where):
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = adapted(12, 20)
    base = model[0].get_base_layer()
    base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), where, placements), requires_grad=False)
    of_bias = [p if p.is_shard(0) else Replicate() for p in placements]
    base.bias = nn.Parameter(distribute_tensor(base.bias.detach(), where, of_bias), requires_grad=False)
    return model


def two_dimensions():
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, g = normal(2, 3, 12, seed=8, dtype=torch.float64), normal(2, 3, 20, seed=9, dtype=torch.float64)
    expected = call(adapted(12, 20))
    for cut in (Shard(0), Shard(1)):  # along the second dimension; the first one has different tokens
        model = with_weight([Replicate(), cut], square())
        shards = distribute_tensor(x, square(), [Shard(0), Replicate()]).requires_grad_()
        y = model(shards)
        (y * distribute_tensor(g, square(), [Replicate()] * 2)).sum().backward()
        trained = [p.grad for part in model[0].trained_parts() for p in part.values()]
        assert_equal(expected, [y.full_tensor(), shards.grad.full_tensor(), *trained])
    for placements in ([Shard(0), Shard(1)], [Shard(0), Shard(0)]):
        model = with_weight(placements, square())
        with pytest.raises(ValueError, match=r"must be cut by columns, Shard\(0\), or by rows"):
            model(distribute_tensor(x, square(), [Replicate()] * 2))
        with pytest.raises(ValueError, match="must be cut by columns"):
            model[0].merge()


def test_a_mesh_of_two_dimensions(four_ranks):
    four_ranks(two_dimensions)


def sharded_too():
    """fully_shard over pairs of ranks that have different samples, tensor parallel within each pair."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    here = square()
    plan = {"layers.*.up_proj": ColwiseParallel(), "layers.*.down_proj": RowwiseParallel()}
    alone, model = adapt(net()), parallelize_module(net(), here["tp"], plan)
    model = adapt(model)
    alone_too = model.model.layers[0].up_proj.base_layer, model.model.layers[0].q_proj.base_layer
    for part in (*alone_too, *model.model.layers, model.model):
        fully_shard(part, mesh=here["dp"])
    ids, mine = torch.cat([IDS, IDS.flip(1)]), here.get_coordinate()[0]
    expected, got = alone(ids), model(ids.chunk(2)[mine])
    torch.testing.assert_close(got, expected.chunk(2)[mine], rtol=1e-11, atol=1e-11)
    expected.square().mean().backward()
    got.square().mean().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 16
    for name, parameter in trained.items():
        grad = alone.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad.full_tensor(), grad, rtol=1e-11, atol=1e-11)


def test_fully_shard_over_the_other_dimension(four_ranks):
    four_ranks(sharded_too)


def in_both(engine="fsdp", **settings):
    """A model that is tensor parallel within pairs of ranks, with fully_shard or DDP over the pairs."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    here = square()
    plan = {"layers.*.up_proj": ColwiseParallel(), "layers.*.down_proj": RowwiseParallel()}
    model = adapt(parallelize_module(net(), here["tp"], plan), **settings)
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model, process_group=here["dp"].get_group(), init_sync=False)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=here["dp"])
    return model


def differing(engine, seeds):
    """What each rank says in its first step, with one seed of the bases per rank."""
    through = in_both(engine, projection_prng_key=seeds[distributed.get_rank()])
    with pytest.raises(ValueError) as raised:
        through(IDS)
    return str(raised.value)


@pytest.mark.parametrize("engine", ["fsdp", "ddp"])
@pytest.mark.parametrize("seeds", [(1, 1, 1, 2), (1, 2, 1, 2), (1, 1, 2, 2)])
def test_ranks_that_differ_are_named_on_all_of_them(four_ranks, engine, seeds):
    """Along each dimension of the mesh, and where only some of the groups along one have a rank that differs."""
    (message,) = set(four_ranks(differing, engine=engine, seeds=seeds))
    first = [str(rank) for rank, seed in enumerate(seeds) if seed == 1]
    assert f"projection_prng_key of adapter 'default' is 1 on ranks {', '.join(first)}, 2 on rank" in message


def saved(folder):
    """Who writes, and what each rank says of an error on one of them."""
    from unittest import mock

    from randlora.checkpoint import writing

    model, written = in_both(), mock.Mock(wraps=writing._write_all)
    with mock.patch.object(writing, "_write_all", written):
        model.save_pretrained(folder)
    here = mock.Mock(wraps=writing._description)
    if distributed.get_rank() == 3:
        here.side_effect = OSError("of rank 3")
    with mock.patch.object(writing, "_description", here), pytest.raises(OSError, match="of rank 3"):
        model.save_pretrained(folder)
    return written.call_count


def test_one_rank_of_all_writes_and_all_hear_of_errors(four_ranks, tmp_path):
    """lambda is spread over pairs of ranks, and the others are in the next step, too."""
    assert four_ranks(saved, folder=str(tmp_path / "adapter")) == [1, 0, 0, 0]
    adapt(net()).save_pretrained(tmp_path / "alone")
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def saved_copies():
    """A copy of a module of the plan that is trained in full."""
    from torch.distributed.tensor import Shard

    model = net()
    parallelize(model, "columns", "head")
    alone, model = (adapt(m, modules_to_save=["head"]) for m in (net(), model))
    for m in (alone, model):
        m(IDS).square().mean().backward()
    (expected,), (found,) = (
        [p.grad for name, p in m.named_parameters() if name.endswith("default.weight") and "head" in name]
        for m in (alone, model)
    )
    assert found.placements == (Shard(0),) and found.device_mesh == mesh()
    torch.testing.assert_close(found.full_tensor(), expected, rtol=1e-11, atol=1e-11)


def test_modules_to_save(four_ranks):
    four_ranks(saved_copies)
