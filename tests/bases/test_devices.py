"""Bases are kept once per device, however many layers use them and however the device is called."""

import gc
import types

import pytest
import torch
from helpers.models import IDS, adapt, layers_of, net

import randlora
from randlora.bases import copies

dispatch = pytest.mark.parametrize("kind, forms", [("dense", (1, 0)), ("very_sparse", (0, 1)), ("hadamard", (0, 1))])


@pytest.fixture
def two_gpus(monkeypatch):
    """Enough of torch.cuda to tell two devices apart; what is drawn for them is on the CPU."""
    cuda = {"current_device": lambda: 0, "current_stream": lambda _: types.SimpleNamespace(synchronize=lambda: None)}
    for name, value in (cuda | {"is_current_stream_capturing": lambda: False}).items():
        monkeypatch.setattr(torch.cuda, name, value)
    drawn = []

    def draw(self, dtype, device):
        drawn.append((dtype, device))
        return torch.zeros(4, 1, 8, dtype=dtype), torch.zeros(8, 2, 4, dtype=dtype)

    monkeypatch.setattr(randlora.RandomBases, "draw", draw)
    return drawn


def test_a_device_has_one_name(two_gpus):
    assert copies.canonical("cuda") == torch.device("cuda", 0)
    bases = randlora.RandomBases(8, 8, 4)
    for _ in range(3):
        for device in ("cuda", "cuda:0", "cuda:1", "cpu"):
            bases.tensors(torch.float32, torch.device(device))
    assert [str(device) for _, device in two_gpus] == ["cuda:0", "cuda:1", "cpu"]
    assert bases.nbytes == 3 * 4 * (4 * 8 + 8 * 2 * 4)
    assert bases.to(device="cuda").device == torch.device("cuda", 0)


@dispatch
def test_a_device_map_has_one_copy_per_device(kind, forms, tmp_path):
    gc.collect()  # models of other tests, which would share their bases and these bases' copies
    accelerate = pytest.importorskip("accelerate")
    places = {"embed": "cpu", "layers.0": "cpu", "layers.1": "disk", "head": "cpu"}
    model = adapt(accelerate.dispatch_model(net(), places, offload_dir=str(tmp_path), main_device="cpu"), kind=kind)
    assert model.model.layers[1].q_proj.base_layer.weight.is_meta
    bases = {id(layer.bases["default"]): layer.bases["default"] for layer in layers_of(model).values()}
    (bases,) = bases.values()
    for _ in range(2):
        model(IDS).sum().backward()
        with torch.no_grad():
            model.eval()(IDS)
    assert (len(bases.copies.dense), len(bases.copies.packed)) == forms


def test_inputs_of_a_layer_go_where_accelerate_takes_those_of_its_base_layer():
    accelerate = pytest.importorskip("accelerate")
    layer = randlora.Linear(torch.nn.Linear(5, 7, device="meta"), r=2)
    hook = accelerate.hooks.AlignDevicesHook(execution_device="meta")
    accelerate.hooks.add_hook_to_module(layer.base_layer, hook)
    x = torch.ones(3, 5)
    assert layer._moved(x).is_meta
    accelerate.hooks.add_hook_to_module(layer.base_layer, accelerate.hooks.ModelHook(), append=True)
    assert layer._moved(x).is_meta
    accelerate.hooks.remove_hook_from_module(layer.base_layer)
    assert layer._moved(x) is x
