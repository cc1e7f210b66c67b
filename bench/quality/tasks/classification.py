"""Texts by class: encoder, mean over its tokens, and a linear head, solved for before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from training import TextClassifier, fit_head

from bench.quality.tasks import cache as caches
from bench.quality.tasks import minilm, sentences, texts


class Classifier(TextClassifier):
    """The demo's classifier: logits, or with ``pooled=True`` what the head gets."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pooled: bool = False) -> torch.Tensor:
        features = self.features(input_ids, attention_mask)
        return features if pooled else self.classifier(features)


class Classification:
    """A task of classes. The head that every method starts from is the best one on the frozen encoder.

    Args:
        data: "names" of the classes, and for "train", "validation" and "test" their "texts" and "labels".
        limits: part -> how many texts of it are used; all, where it is not named.
    """

    metric, larger_is_better = "accuracy", True
    kept_metric, larger_kept_is_better = sentences.METRIC, True
    head = ["classifier"]  # noqa: RUF012
    untuned = "best head"

    def __init__(
        self, name: str, data: dict[str, Any], *, longest: int, size: int, steps: int, limits: dict[str, int],
        kept: int, cache: str | None,
    ) -> None:  # fmt: skip
        self.name, self.size, self.steps, self.cache = name, size, steps, cache
        self.names: list[str] = data["names"]
        self.pretrained = minilm.pretrained(minilm.locate(cache))
        used = {}
        for part in ("train", "validation", "test"):
            rows = list(zip(data[part]["texts"], data[part]["labels"], strict=True))
            used[part] = texts.choose(rows, limits.get(part, len(rows)))
        tokenizer = self.pretrained.tokenizer
        self.tokens = {
            part: minilm.Tokens([text for text, _ in rows], tokenizer, longest) for part, rows in used.items()
        }
        self.labels = {part: torch.tensor([label for _, label in rows]) for part, rows in used.items()}
        self.sentences = sentences.Sentences(kept, tokenizer, cache)
        recipe = {"longest": longest, "size": size, "steps": steps}
        self.fingerprint = caches.digest(
            name, self.names, used, recipe, self.sentences.pairs, self.pretrained.fingerprint
        )
        self._device = torch.device("cpu")
        self._solved: dict[str, torch.Tensor] | None = None

    def model(self, device: str) -> Classifier:
        self._device = torch.device(device)
        if self._solved is None:
            self._solved = self._head()
        model = Classifier(self.pretrained.copy(), len(self.names))
        model.classifier.load_state_dict(self._solved)
        return model.to(device)

    def batches(self, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(ids, mask, labels): int64, (size, length), (size, length), (size,), on the device of the last model."""
        tokens, labels = self.tokens["train"], self.labels["train"]
        for rows in minilm.orders(tokens.lengths, self.size, self.steps, seed):
            yield *tokens.batch(rows, self._device), labels[rows].to(self._device)

    def loss(self, model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, mask, labels = batch
        return F.cross_entropy(model(input_ids=ids, attention_mask=mask).float(), labels)

    def score(self, model: nn.Module, split: str) -> float:
        logits = minilm.outputs(model, self.tokens[split])
        return (logits.argmax(1).cpu() == self.labels[split]).double().mean().item()

    def validation_loss(self, model: nn.Module) -> float:
        logits = minilm.outputs(model, self.tokens["validation"])
        return F.cross_entropy(logits.cpu(), self.labels["validation"]).item()

    def kept(self, model: nn.Module) -> float:
        """Without the head."""
        return self.sentences.score(model, pooled=True)

    def _head(self) -> dict[str, torch.Tensor]:
        """Weight and bias, from the cache if it holds those of this fingerprint, so that every process has the same."""
        path = Path(self.cache) / f"{self.name}-head-{self.fingerprint[:12]}.safetensors" if self.cache else None
        if path is not None and path.is_file():
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        model = Classifier(self.pretrained.copy(), len(self.names)).to(self._device)
        sets = [SimpleNamespace(labels=self.labels[part]) for part in ("train", "validation")]
        features = [
            minilm.outputs(model, self.tokens[part], progress=self._bar, pooled=True).cpu()
            for part in ("train", "validation")
        ]
        with torch.random.fork_rng(devices=[]):
            fit_head(model.cpu(), (*features, None), (*sets, None))
        found = {name: tensor.detach().contiguous() for name, tensor in model.classifier.state_dict().items()}
        if path is not None:
            caches.write(path, lambda new: save_file(found, new))
        return found

    def _bar(self, batches: range) -> tqdm:
        return tqdm(
            batches, desc=f"{self.name}: frozen encoder", leave=False, mininterval=0.2 if sys.stderr.isatty() else 20
        )
