"""Task "language": a small language model, pretrained on Python sources, learns to write C++ headers.

Scores are perplexities per token, on headers that it has not seen and, as what it has kept, on Python files that its
pretraining has not seen. The weights come from :mod:`bench.quality.tasks.pretrain`, the text from
:mod:`bench.quality.tasks.corpus`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.quality.tasks import corpus as corpora
from bench.quality.tasks.corpus import Corpus
from bench.quality.tasks.pretrain import (
    CONTEXT,
    Recipe,
    new_model,
    next_token_loss,
    pretrained,
    random_starts,
    tensor_of,
    windows,
)

STEPS, QUICK_STEPS = 200, 60
BATCH = 16
HELD_OUT_WINDOWS, QUICK_WINDOWS = 256, 32  # that a loss is taken over, spread evenly over the split

QUICK_RECIPE = Recipe(width=128, layers=4, steps=300, batch=8)
WIDTHS = {  # for the rule of scale
    width: Recipe(width, layers=4, steps=steps) for width, steps in ((128, 1200), (256, 1200), (512, 800), (1024, 800))
}
RECIPE = WIDTHS[512]  # 18.9 M numbers


class Language:
    """See :class:`bench.quality.tasks.Task`. Batches are ids ``[16, 256]``, int64, where the last model went."""

    metric = kept_metric = "perplexity"
    larger_is_better = larger_kept_is_better = False
    untuned = "untuned"

    def __init__(
        self, corpus: Corpus, recipe: Recipe, cache: Path | None, *, steps: int, held_out_windows: int,
        name: str = "language",
    ) -> None:  # fmt: skip
        self.name = name
        self.head: list[str] = []
        self.corpus, self.recipe, self.cache, self.steps, self.held_out_windows = (
            corpus,
            recipe,
            cache,
            steps,
            held_out_windows,
        )
        # The recipe stands for the weights, which no two machines make alike to the last bit.
        settings = f"{recipe.fingerprint(corpus)} {held_out_windows}"
        self.fingerprint = hashlib.sha256(settings.encode()).hexdigest()
        self._device = "cpu"
        self._weights: dict[str, Tensor] | None = None
        self._tensors: dict[tuple[str, str], Tensor] = {}

    def model(self, device: str) -> nn.Module:
        self._device = str(device)
        if self._weights is None:
            self._weights = pretrained(self.recipe, self._device, self.corpus, self.cache)
        model = new_model(self.recipe)
        missing, unexpected = model.load_state_dict(self._weights, strict=False)
        if unexpected or missing not in ([], ["lm_head.weight"]):
            raise ValueError(f"weights of {self.recipe.name} do not fit: {missing} missing, {unexpected} not known")
        model.tie_weights()
        return model.to(device)

    def batches(self, seed: int) -> Iterator[Tensor]:
        ids = self._on_device("train")
        for starts in random_starts(ids.numel(), self.steps, BATCH, seed).to(ids.device):
            yield windows(ids, starts)

    def loss(self, model: nn.Module, batch: Tensor) -> Tensor:
        return next_token_loss(model, batch)

    def score(self, model: nn.Module, split: str) -> float:
        return math.exp(min(self._held_out_loss(model, split), 100.0))

    def validation_loss(self, model: nn.Module) -> float:
        return self._held_out_loss(model, "validation")

    def kept(self, model: nn.Module) -> float:
        return math.exp(min(self._held_out_loss(model, "kept"), 100.0))

    def _on_device(self, split: str) -> Tensor:
        key = split, self._device
        if key not in self._tensors:
            self._tensors[key] = tensor_of(self.corpus.ids[split], self._device)
        return self._tensors[key]

    @torch.no_grad()
    def _held_out_loss(self, model: nn.Module, split: str) -> float:
        """The mean over windows that do not overlap."""
        ids = self._on_device(split)
        count = min(self.held_out_windows, ids.numel() // CONTEXT)
        starts = (torch.arange(count) * (ids.numel() // count)).to(ids.device)
        training = model.training
        model.eval()
        losses = [next_token_loss(model, windows(ids, part)) * len(part) for part in starts.split(4 * BATCH)]
        model.train(training)
        return torch.stack(losses).sum().item() / count


def make(*, quick: bool = False, cache: str | None = None, width: int | None = None) -> Language:
    """The task. `width`: one of :data:`WIDTHS`, for a model of that width in place of the task's own."""
    if width is not None and width not in WIDTHS:
        raise ValueError(f"width must be one of {', '.join(map(str, WIDTHS))}, got {width}")
    folder = None if cache is None else Path(cache)
    recipe = RECIPE if width is None else WIDTHS[width]
    if quick:
        recipe = dataclasses.replace(QUICK_RECIPE, width=width or QUICK_RECIPE.width)
    return Language(
        corpora.corpus(quick=quick, cache=folder),
        recipe,
        folder,
        steps=QUICK_STEPS if quick else STEPS,
        held_out_windows=QUICK_WINDOWS if quick else HELD_OUT_WINDOWS,
        name="language" if width is None else f"language-{width}",
    )
