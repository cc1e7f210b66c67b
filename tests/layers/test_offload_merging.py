"""Merging into layers that accelerate offloads, and unloading their adapters."""

import copy

import pytest
import torch
from helpers.common import reference_update
from helpers.models import IDS, adapt, layers_of, net
from helpers.offloading import offloaded, ways

import randlora
from randlora.layers import offload

accelerate = pytest.importorskip("accelerate")


@ways
@pytest.mark.parametrize("when", ["before", "after"])
def test_merging(way, when, tmp_path):
    with torch.no_grad():
        expected, plain = adapt(net())(IDS), net()(IDS)
        model = adapt(offloaded(net(), way, tmp_path)) if when == "before" else offloaded(adapt(net()), way, tmp_path)
        model.merge_adapter(safe_merge=True)
        assert all(layer.merged for layer in layers_of(model).values())
        torch.testing.assert_close(model(IDS), expected, rtol=1e-11, atol=1e-11)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
        with model.disable_adapter():
            assert torch.equal(model(IDS), plain)
        model.merge_adapter()
        model.unmerge_adapter()
        model.merge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(IDS), plain)
        merged = model.merge_and_unload()
        assert not any(isinstance(module, randlora.Linear) for module in merged.modules())
        torch.testing.assert_close(merged(IDS), expected, rtol=1e-11, atol=1e-11)


@ways
def test_unload(way, tmp_path):
    plain = net()(IDS)
    assert torch.equal(adapt(offloaded(net(), way, tmp_path / "a")).unload()(IDS), plain)
    model = offloaded(adapt(net()), way, tmp_path / "b")
    model.merge_adapter()
    assert torch.equal(model.unload()(IDS), plain)


def test_merging_leaves_the_weights_that_a_model_is_offloaded_from():
    given = {name: tensor.clone() for name, tensor in net().state_dict().items()}
    before = copy.deepcopy(given)
    model = adapt(accelerate.cpu_offload(net(), torch.device("cpu"), state_dict=given))
    model.merge_adapter()
    model(IDS)
    assert all(torch.equal(given[name], before[name]) for name in before)
    assert not torch.equal(
        offload.read(model.model.layers[0].q_proj.base_layer, "weight"), before["layers.0.q_proj.weight"]
    )


def test_merged_then_offloaded_then_unmerged(tmp_path):
    model, plain = adapt(net()), net()(IDS)
    expected = model(IDS)
    model.merge_adapter()
    offloaded(model, "cpu", tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), expected, rtol=1e-11, atol=1e-11)
        model.unmerge_adapter()
        with model.disable_adapter():
            assert torch.equal(model(IDS), plain)


def test_merged_while_offloaded_then_brought_in_then_unmerged(tmp_path):
    model = adapt(offloaded(net(), "cpu", tmp_path))
    model.merge_adapter()
    accelerate.hooks.remove_hook_from_submodules(model)
    update = reference_update(model.model.layers[0].q_proj)
    torch.testing.assert_close(
        model.model.layers[0].q_proj.weight, net().layers[0].q_proj.weight + update, rtol=1e-11, atol=1e-11
    )
    model.unmerge_adapter()
    assert torch.equal(model.model.layers[0].q_proj.weight, net().layers[0].q_proj.weight)
