"""Layers whose weight is cut over ranks: which adapters act, merging, and dropout, as of a layer alone."""

import pytest
import torch
from helpers.common import make_base, normal
from helpers.models import adapt
from helpers.tensor_parallel import adapted, assert_equal, call, mesh, parallelize
from torch import nn

distributed = torch.distributed


# ---- adapters: off, in part, per sample, merged ----


def which_act():
    for way in ("columns", "rows"):
        alone, parallel = (adapted(12, 20, way=w, kinds=["dense", "hadamard"]) for w in (None, way))
        plain = nn.Sequential(make_base(12, 20, dtype=torch.float64))
        for change in (
            lambda layer: layer.set_adapter("1"),
            lambda layer: layer.enable_adapters(False),
            lambda layer: layer.enable_adapters(True),
            lambda layer: layer.set_adapter(["0", "1"]),
            lambda layer: layer.delete_adapter("0"),
        ):
            for model in (alone, parallel):
                change(model[0])
            assert_equal(call(alone), call(parallel))
        parallel[0] = parallel[0].get_base_layer()
        x = normal(4, 12, dtype=torch.float64)
        torch.testing.assert_close(parallel(x), plain(x))


def test_the_same_adapters_act(two_ranks):
    two_ranks(which_act)


def per_sample():
    from randlora.layers.mixed_batch import mixed_batch

    for way in ("columns", "rows"):
        results = []
        for w in (None, way):
            model = adapted(12, 20, way=w, kinds=["dense", "hadamard"])
            with mixed_batch(model, [model[0]], ["1", "__base__", "0", "1"]):
                results.append(call(model, (4, 3)))
        assert_equal(*results)


def test_samples_go_through_their_own_adapters(two_ranks):
    two_ranks(per_sample)


def merging():
    for way in ("columns", "rows"):
        for into, out in ((12, 21), (21, 12)):
            for before in (True, False):
                model = adapted(into, out, way=way, before=before, kinds=["dense", "hadamard", "very_sparse"])
                layer, alone = model[0], adapted(into, out, kinds=["dense", "hadamard", "very_sparse"])
                weight, expected = layer.weight.to_local().clone(), call(alone)[0]
                layer.merge(safe_merge=True, adapter_names=["1", "0"])
                torch.testing.assert_close(call(model)[0], expected)
                layer.merge()
                torch.testing.assert_close(call(model)[0], expected)
                alone[0].merge()
                torch.testing.assert_close(layer.weight.full_tensor(), alone[0].weight)
                layer.unmerge()
                assert torch.equal(layer.weight.to_local(), weight)
                with torch.no_grad():  # not finite on one rank only
                    layer.randlora_gamma["0"][:, -1] = float("nan")
                with pytest.raises(ValueError, match="NaN"):
                    layer.merge(safe_merge=True)
                assert torch.equal(layer.weight.to_local(), weight) and not layer.merged


def test_each_rank_merges_its_part(two_ranks):
    two_ranks(merging)


def merged_first():
    """The weight as it was is whole then, and each rank takes its part of it."""
    for way in ("columns", "rows"):
        model, alone = adapted(12, 21), adapted(12, 21)
        original, expected = model[0].weight.detach().clone(), call(alone)[0]
        model[0].merge()
        parallelize(model, way, "0.base_layer")
        torch.testing.assert_close(call(model)[0], expected)
        model[0].unmerge()
        assert torch.equal(model[0].weight.full_tensor(), original)
        assert_equal(call(alone), call(model))


def test_a_merged_layer_that_is_cut_then_is_unmerged(two_ranks):
    two_ranks(merged_first)


def shared_weight():
    """As of tied embeddings: what is merged into the head must not reach them."""
    from torch.distributed.tensor import Shard, distribute_tensor

    model = nn.Sequential(nn.Embedding(20, 12), nn.Linear(12, 20, bias=False))
    whole = normal(20, 12)
    model[0].weight = model[1].weight = nn.Parameter(distribute_tensor(whole, mesh(), [Shard(0)]))
    model = adapt(model, target_modules=["1"])
    with pytest.warns(UserWarning, match="shares its weight"):
        model.merge_adapter()
    update = model.model[1].get_delta_weight("default")
    torch.testing.assert_close(model.model[0].weight.full_tensor(), whole)
    torch.testing.assert_close(model.model[1].weight.full_tensor(), whole + update)


def test_merging_parts_weights_that_are_shared(two_ranks):
    two_ranks(shared_weight)


def hooks_of_others():
    model = adapted(12, 20, way="columns")
    model[0].get_base_layer().register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="with hooks"):
        model[0].merge()


def test_what_others_put_around_it_is_not_merged_into(two_ranks):
    two_ranks(hooks_of_others)


# ---- dropout ----


def dropped(kind):
    """Whether the mask is one for all ranks and drops what it should: of ones, by a layer that repeats its inputs."""
    shares = {}
    for way in ("columns", "rows"):
        torch.manual_seed(distributed.get_rank())  # ranks need not draw the same numbers
        model = adapted(24, 24, way=way, kinds=[kind], randlora_dropout=0.4, bias=False)
        alone = adapted(24, 24, kinds=[kind], bias=False)
        with torch.no_grad():
            alone[0].get_base_layer().weight.zero_()
            model[0].get_base_layer().weight.zero_()
        x = normal(300, 24, seed=3, dtype=torch.float64).requires_grad_()
        y = model(x)
        everywhere = [torch.empty_like(y) for _ in range(distributed.get_world_size())]
        distributed.all_gather(everywhere, y.detach())
        assert torch.equal(everywhere[0], everywhere[1])
        update = alone[0].get_delta_weight("0").detach()
        mask = torch.linalg.lstsq(update, y.detach().t()).solution.t() / x.detach() * 0.6  # what went in
        assert ((mask - mask.round()).abs() < 1e-6).all() and set(mask.round().flatten().tolist()) == {0.0, 1.0}
        shares[way] = mask.mean().item()
        halves = mask.round()[:, :12], mask.round()[:, 12:]
        assert 0.3 < (halves[0] == halves[1]).double().mean() < 0.7  # not the same mask for each part
        g = normal(300, 24, seed=4, dtype=torch.float64)
        y.backward(g)
        torch.testing.assert_close(x.grad, (g @ update) * mask.round() / 0.6)
        dW = (g.t() @ (x.detach() * mask.round() / 0.6)).detach()
        lam, gamma = alone[0].randlora_lambda["0"], alone[0].randlora_gamma["0"]
        (alone[0].get_delta_weight("0") * dW).sum().backward()
        torch.testing.assert_close(model[0].randlora_lambda["0"].grad, lam.grad)
        torch.testing.assert_close(model[0].randlora_gamma["0"].grad, gamma.grad)
        model.eval()
        torch.testing.assert_close(model(x), x @ update.t())
    return shares


@pytest.mark.parametrize("kind", ["dense", "hadamard"])
def test_dropout_has_one_mask_for_all_ranks(two_ranks, kind):
    for shares in two_ranks(dropped, kind=kind):
        assert all(0.57 < share < 0.63 for share in shares.values()), shares


def checkpointed():
    from torch.utils.checkpoint import checkpoint

    for way in ("columns", "rows"):
        torch.manual_seed(distributed.get_rank())
        model = adapted(12, 20, way=way, randlora_dropout=0.4)
        state = torch.get_rng_state()
        expected = call(model)
        torch.set_rng_state(state)
        assert_equal(expected, call(model, through=lambda x, model=model: checkpoint(model, x, use_reentrant=False)))


def test_checkpointing_drops_the_same(two_ranks):
    two_ranks(checkpointed)
