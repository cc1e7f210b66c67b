"""A task of milliseconds, to try the script: two linear layers and a head learn what another such model says."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Model(nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.second, self.head = nn.Linear(12, 20), nn.Linear(20, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class TinyTask:
    metric, kept_metric, larger_is_better, larger_kept_is_better = "accuracy", "loss", True, False
    head, untuned, steps = ["head"], "best head", 8
    name, fingerprint = "tiny", "made up"

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        x = 2 * torch.randn(120, 12, generator=generator)
        with torch.no_grad():
            y = Model(5)(x).argmax(1)
        cut = {"train": slice(64), "validation": slice(64, 92), "test": slice(92, 120)}
        self.data = {split: {"x": x[part], "y": y[part]} for split, part in cut.items()}

    def model(self, device: str) -> nn.Module:
        return Model(4).to(device)

    def batches(self, seed: int) -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(64, generator=torch.Generator().manual_seed(seed))
        for rows in order.split(8):
            yield {name: value[rows] for name, value in self.data["train"].items()}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(x=batch["x"]), batch["y"])

    @torch.no_grad()
    def score(self, model: nn.Module, split: str) -> float:
        return (self._logits(model, split).argmax(1).cpu() == self.data[split]["y"]).float().mean().item()

    @torch.no_grad()
    def validation_loss(self, model: nn.Module) -> float:
        return self._loss(model, "validation")

    @torch.no_grad()
    def kept(self, model: nn.Module) -> float:
        return self._loss(model, "test")

    def _logits(self, model: nn.Module, split: str) -> Tensor:
        return model(x=self.data[split]["x"].to(next(model.parameters()).device))

    def _loss(self, model: nn.Module, split: str) -> float:
        return nn.functional.cross_entropy(self._logits(model, split).cpu(), self.data[split]["y"]).item()
