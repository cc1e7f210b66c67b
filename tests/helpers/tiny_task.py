"""A task for bench/quality that takes milliseconds: two linear layers and a head, on what another such model says."""

import hashlib

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TinyTask:
    metric, kept_metric, larger_is_better, larger_kept_is_better = "accuracy", "loss", True, False
    head, untuned, steps = ["head"], "best head", 8

    def __init__(self, name, quick):
        self.name = name
        self.fingerprint = hashlib.sha256(f"{name} {quick}".encode()).hexdigest()
        generator = torch.Generator().manual_seed(1)
        x = 2 * torch.randn(120, 12, generator=generator)
        with torch.no_grad():
            y = Model(5)(x).argmax(1)
        cut = {"train": slice(64), "validation": slice(64, 92), "test": slice(92, 120)}
        self.data = {split: {"x": x[part], "y": y[part]} for split, part in cut.items()}

    def model(self, device):
        return Model(4).to(device)

    def batches(self, seed):
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        for rows in order.split(8):
            yield {name: value[rows] for name, value in self.data["train"].items()}

    def loss(self, model, batch):
        return nn.functional.cross_entropy(model(x=batch["x"]), batch["y"])

    @torch.no_grad()
    def score(self, model, split):
        assert not model.training
        return (model(x=self.data[split]["x"]).argmax(1) == self.data[split]["y"]).float().mean().item()

    @torch.no_grad()
    def validation_loss(self, model):
        return self.loss(model, self.data["validation"]).item()

    @torch.no_grad()
    def kept(self, model):
        return self.loss(model, self.data["test"]).item()


def make(name, quick=False, cache=None):
    if name == "search":
        raise ValueError("no data on this machine")
    return TinyTask(name, quick)
