"""Models whose parameters FSDP2 shards: adapters train as ever, and merging is refused."""

import pytest
import torch
from helpers.models import IDS, adapt, net

import randlora

fsdp = pytest.importorskip("torch.distributed.fsdp")
distributed = torch.distributed


@pytest.fixture
def mesh(tmp_path):
    if not distributed.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    assert not distributed.is_initialized(), "another test left its process group"
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("sharded", ["wrapper", "model", "blocks"])
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused(sharded, method, mesh):
    """After a call the root's parameters are whole, and what is written into them is lost at the next reshard."""
    model = adapt(net())
    with torch.no_grad():
        expected = model(IDS)
        for part in {"wrapper": [model], "model": [model.model], "blocks": model.model.layers}[sharded]:
            fsdp.fully_shard(part, mesh=mesh)
        torch.testing.assert_close(model(IDS), expected)
        with pytest.raises(ValueError, match=r"put together by fully_shard for every call"):
            getattr(model, method)()
        assert not any(layer.merged for layer in model.modules() if isinstance(layer, randlora.Linear))
        for part in model.modules():
            if isinstance(part, fsdp.FSDPModule):
                part.reshard()
        torch.testing.assert_close(model(IDS), expected)
