"""Training that is stopped anywhere goes on from its checkpoint with the same bits, dropout included."""

import pytest
import torch
from helpers.models import CLASSES, IDS, WORDS, adapt, net
from torch import nn

import randlora

STEPS = 5
SETTINGS = {
    "dense": {},
    "hadamard": {"kind": "hadamard"},
    "very_sparse": {"kind": "very_sparse", "sparsity": 10.0},
    "dense, not saved": {"save_projection": False},
    "with a module": {"kind": "hadamard", "modules_to_save": ["head"], "bias": "all"},
}


def batch(i):
    generator = torch.Generator().manual_seed(100 + i)
    return tuple(torch.randint(0, limit, IDS.shape, generator=generator) for limit in (WORDS, CLASSES))


def optimizer_of(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model, optimizer, steps):
    losses = []
    for i in steps:
        ids, classes = batch(i)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1).float(), classes.flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def save(folder, model, optimizer):
    model.save_pretrained(folder)
    torch.save({"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}, folder / "training.pt")


def resumed(folder, dtype):
    torch.manual_seed(77)  # another process has used other random numbers
    model = randlora.RandLoraModel.from_pretrained(net(dtype), folder, is_trainable=True).train()
    optimizer = optimizer_of(model)
    state = torch.load(folder / "training.pt")
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"])
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_losses_are_those_of_training_that_was_not_stopped(settings, dtype, tmp_path):
    torch.manual_seed(1)
    model = adapt(net(dtype), randlora_dropout=0.1, **settings).train()
    optimizer = optimizer_of(model)
    expected = []
    for i in range(STEPS):
        save(tmp_path / str(i), model, optimizer)
        expected += train(model, optimizer, [i])
    assert len(set(expected)) == STEPS

    for i in range(STEPS):
        assert train(*resumed(tmp_path / str(i), dtype), range(i, STEPS)) == expected[i:], i

    # Stopped after every single step.
    found = []
    for i in range(STEPS):
        folder = tmp_path / (f"again{i}" if i else "0")
        model, optimizer = resumed(folder, dtype)
        found += train(model, optimizer, [i])
        save(tmp_path / f"again{i + 1}", model, optimizer)
    assert found == expected

    # The masks are a part of that.
    model, optimizer = resumed(tmp_path / "0", dtype)
    torch.manual_seed(2)
    assert train(model, optimizer, range(STEPS)) != expected
