"""A small causal language model, pretrained here: the recipe and its seed are what is kept, weights are made anew.

They lie in the cache folder of the machine that made them, ``language-<width>x<layers>.safetensors``, and are taken
from there where the recipe and the corpus are the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.quality.tasks import cache as caches
from bench.quality.tasks.corpus import VOCABULARY, Corpus

CONTEXT = 256
LOG_EVERY = 100  # steps


@dataclass(frozen=True)
class Recipe:
    """A transformer of Llama's form, and how it is pretrained: AdamW, warm-up, a cosine down to a tenth.

    Attributes:
        rate: the highest learning rate; None: by the width, ``3e-3 * sqrt(128 / width)``.
    """

    width: int = 384
    layers: int = 6
    steps: int = 2000
    batch: int = 64
    rate: float | None = None
    seed: int = 0
    vocabulary: int = VOCABULARY

    @property
    def highest_rate(self) -> float:
        return 3e-3 * math.sqrt(128 / self.width) if self.rate is None else self.rate

    @property
    def name(self) -> str:
        return f"language-{self.width}x{self.layers}"

    def fingerprint(self, corpus: Corpus) -> str:
        """SHA-256 of the recipe and the corpus, in hex: which weights to expect, up to the rounding of a machine."""
        said = json.dumps(dataclasses.asdict(self) | {"context": CONTEXT}, sort_keys=True)
        return hashlib.sha256(f"{said} {corpus.fingerprint}".encode()).hexdigest()


def new_model(recipe: Recipe) -> nn.Module:
    """The model with the random weights of the recipe's seed, on the CPU in fp32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.width,
        intermediate_size=4 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=max(1, recipe.width // 64),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
        attn_implementation="sdpa",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LlamaForCausalLM(config)


def pretrained(recipe: Recipe, device: str, corpus: Corpus, cache: Path | None = None) -> dict[str, Tensor]:
    """The weights on the CPU, fp32: from `cache`, or made on `device`, which takes minutes, and written there.

    Where several processes ask at once, one makes them and the others wait.
    """
    from safetensors.torch import save_file

    if cache is None:
        return _train(recipe, device, corpus)[0]
    path = cache / f"{recipe.name}.safetensors"
    fingerprint = recipe.fingerprint(corpus)
    if (found := _read(path, fingerprint)) is None:
        with _alone(path.with_suffix(".lock")):
            if (found := _read(path, fingerprint)) is None:
                found, log = _train(recipe, device, corpus)
                caches.write(path, lambda partial: save_file(found, partial, {"fingerprint": fingerprint}))
                rows = "".join(f"{step},{seconds:.1f},{loss:.4f}\n" for step, seconds, loss in log)
                caches.write(path.with_suffix(".csv"), lambda partial: partial.write_text("step,seconds,loss\n" + rows))
    return found


def _read(path: Path, fingerprint: str) -> dict[str, Tensor] | None:
    from safetensors import safe_open

    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("fingerprint") != fingerprint:
            return None
        return {name: file.get_tensor(name) for name in list(file.keys())}


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with the process that has it, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def windows(ids: Tensor, starts: Tensor, length: int = CONTEXT) -> Tensor:
    """``ids[start : start + length]`` for each start, int64 ``[len(starts), length]``."""
    return ids[starts[:, None] + torch.arange(length, device=ids.device)].long()


def random_starts(tokens: int, steps: int, batch: int, seed: int) -> Tensor:
    """Where the windows of a training run begin, ``[steps, batch]``: by the seed alone, on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, tokens - CONTEXT + 1, (steps, batch), generator=generator)


def tensor_of(ids, device: str) -> Tensor:
    """A corpus' uint16 ids as a tensor of a dtype that can be indexed into everywhere."""
    return torch.from_numpy(ids.astype("int32")).to(device)


def _train(recipe: Recipe, device: str, corpus: Corpus) -> tuple[dict[str, Tensor], list[tuple[int, float, float]]]:
    """The trained weights, and ``(step, seconds, mean loss since the last)``."""
    on_gpu = torch.device(device).type == "cuda"
    model = new_model(recipe).to(device).train()
    ids = tensor_of(corpus.ids["pretraining"], device)
    starts = random_starts(ids.numel(), recipe.steps, recipe.batch, recipe.seed).to(device)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.highest_rate, betas=(0.9, 0.95), fused=True)
    # In bfloat16 on a GPU, and on a CPU where it was asked for; there, compiled, it takes 0.8 times as long.
    low = on_gpu or torch.get_float32_matmul_precision() == "medium"
    loss_of = torch.compile(next_token_loss) if low and not on_gpu else next_token_loss
    tqdm.write(f"pretraining {recipe.name} on {device}: {recipe.steps} steps of {recipe.batch} x {CONTEXT} tokens")
    log, total, began = [], torch.zeros((), device=device), time.perf_counter()
    for step in (
        bar := tqdm(range(recipe.steps), desc=f"pretraining {recipe.name}", unit="step", leave=False, disable=None)
    ):
        for group in optimizer.param_groups:
            group["lr"] = recipe.highest_rate * cosine(step, recipe.steps)
        batch = windows(ids, starts[step])
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=low):
            loss = loss_of(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=on_gpu)
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == recipe.steps:
            since = step % LOG_EVERY + 1
            log.append((step + 1, time.perf_counter() - began, total.item() / since))
            bar.set_postfix(loss=f"{log[-1][2]:.3f}")
            total.zero_()
    if not math.isfinite(log[-1][2]):
        raise FloatingPointError(f"pretraining {recipe.name} diverged: its last losses are {log[-3:]}")
    model.tie_weights()
    state = {name: value.detach().float().cpu().clone() for name, value in model.state_dict().items()}
    del state["lm_head.weight"]  # tied to the embedding
    return state, log


def cosine(step: int, steps: int, warm: float = 0.05, last: float = 0.1) -> float:
    """The factor of the learning rate: up within `warm` of the steps, then down to `last`."""
    if step < warm * steps:
        return (step + 1) / (warm * steps + 1)
    at = (step - warm * steps) / max(1, steps - warm * steps)
    return last + (1 - last) * (1 + math.cos(math.pi * at)) / 2


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of each id but the first, in nats; ids ``[batch, length]``."""
    logits = model(input_ids=ids[:, :-1]).logits.float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
