"""What MiniLM was pretrained for: finding sentences that belong together. Shows what training has made it forget."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn

from bench.quality.tasks import cache as caches
from bench.quality.tasks import minilm, texts

METRIC = "MRR of sentences"
COUNT = 500
LONGEST = 48


class Sentences:
    """First sentences of docstrings and what follows them, in modules of Python's library that no task trains on."""

    def __init__(self, count: int, tokenizer: Tokenizer, cache: str | None) -> None:
        self.pairs = texts.choose(caches.data("sentences", cache, lambda: texts.sentence_pairs(COUNT)), count)
        self.first, self.rest = (
            minilm.Tokens([pair[side] for pair in self.pairs], tokenizer, LONGEST) for side in (0, 1)
        )

    def score(self, model: nn.Module, **options: Any) -> float:
        """Mean reciprocal rank of what follows among all of them. `options` go to the model."""
        first, rest = (
            F.normalize(minilm.outputs(model, tokens, **options), dim=1) for tokens in (self.first, self.rest)
        )
        return minilm.reciprocal_rank(first, rest)
