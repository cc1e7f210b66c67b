"""Search in code: which body of a function belongs to a docstring? MiniLM was pretrained on little of it.

It is trained on pairs, with the other bodies of the batch as wrong answers, and tested on packages that it never saw.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bench.quality.tasks import cache as caches
from bench.quality.tasks import minilm, sentences, texts

NAME = "search"
TEMPERATURE = 0.05

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def make(*, quick: bool = False, cache: str | None = None) -> Search:
    data = caches.data(NAME, cache, build)
    pools = {"validation": 200, "test": 400} if quick else {"validation": 500, "test": 1000}
    return Search(
        data, longest=48 if quick else 96, size=32 if quick else 40, steps=50 if quick else 200, pools=pools,
        kept=200 if quick else 500, cache=cache,
    )  # fmt: skip


def build() -> dict[str, Any]:
    pairs, _ = texts.function_pairs()
    parts = texts.parts_of(pairs)
    for part, packages in parts.items():
        if not packages:
            raise FileNotFoundError(f"too few packages with sources are installed: there is none for {part}")
    return {
        "train": texts.spread(pairs, parts["train"], most=1500, count=8000),
        "validation": texts.spread(pairs, parts["validation"], most=100, count=500),
        "test": texts.spread(pairs, parts["test"], most=150, count=1000),
    }


class Search:
    """See the module."""

    name, metric, larger_is_better = NAME, "MRR", True
    kept_metric, larger_kept_is_better = sentences.METRIC, True
    head: list[str] = []  # noqa: RUF012
    untuned = "untuned"

    def __init__(
        self, data: dict[str, Any], *, longest: int, size: int, steps: int, pools: dict[str, int], kept: int,
        cache: str | None,
    ) -> None:  # fmt: skip
        self.size, self.steps = size, steps
        self.pretrained = minilm.pretrained(minilm.locate(cache))
        tokenizer = self.pretrained.tokenizer
        used = {part: texts.choose(rows, pools.get(part, len(rows))) for part, rows in data.items()}
        self.tokens = {
            part: tuple(
                minilm.Tokens([pair[side] for pair in rows], tokenizer, most)
                for side, most in ((0, min(longest, 32)), (1, longest))
            )
            for part, rows in used.items()
        }
        self.sentences = sentences.Sentences(kept, tokenizer, cache)
        recipe = {"longest": longest, "size": size, "steps": steps, "temperature": TEMPERATURE}
        self.fingerprint = caches.digest(NAME, used, recipe, self.sentences.pairs, self.pretrained.fingerprint)
        self._device = torch.device("cpu")

    def model(self, device: str) -> minilm.Embedder:
        self._device = torch.device(device)
        return minilm.Embedder(self.pretrained.copy()).to(device)

    def batches(self, seed: int) -> Iterator[Batch]:
        """(ids, mask) of the docstrings and (ids, mask) of the bodies; int64, on the device of the last model."""
        docstrings, bodies = self.tokens["train"]
        for rows in minilm.orders(bodies.lengths, self.size, self.steps, seed):
            yield *docstrings.batch(rows, self._device), *bodies.batch(rows, self._device)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        ids, mask, body_ids, body_mask = batch
        docstrings = model(input_ids=ids, attention_mask=mask)
        bodies = model(input_ids=body_ids, attention_mask=body_mask)
        return contrast(docstrings, bodies)

    def score(self, model: nn.Module, split: str) -> float:
        return minilm.reciprocal_rank(*self._outputs(model, split))

    def validation_loss(self, model: nn.Module) -> float:
        return contrast(*self._outputs(model, "validation")).item()

    def kept(self, model: nn.Module) -> float:
        return self.sentences.score(model)

    def _outputs(self, model: nn.Module, split: str) -> list[torch.Tensor]:
        return [minilm.outputs(model, tokens) for tokens in self.tokens[split]]


def contrast(queries: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the right answer among all of the batch. Both: (n, width), of norm 1."""
    alike = queries.float() @ answers.float().T / TEMPERATURE
    return F.cross_entropy(alike, torch.arange(len(alike), device=alike.device))
