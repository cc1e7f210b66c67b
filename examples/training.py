"""The classifier (a pretrained encoder, the mean over its tokens, a linear head) and how it is trained."""

import logging
import math
import os
import random
import sys
import time
from dataclasses import dataclass, field

import processes
import torch
import torch.nn.functional as F
from text_data import UserError
from torch import nn
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()  # ours are the ones to watch
# What transformers and PEFT import on the way tells of its parts for other machines, and of what it has to change for
# the next torch: nothing that whoever runs the demo can use.
for package in ("torchao", "bitsandbytes", "torch.utils._pytree"):
    logging.getLogger(package).setLevel(logging.ERROR)


class TextClassifier(nn.Module):
    def __init__(self, encoder, classes):
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.config.hidden_size, classes)

    def features(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, input_ids, attention_mask):
        return self.classifier(self.features(input_ids, attention_mask))


def load_pretrained(model, classes, max_length, device):
    """The model with a new head, and its tokenizer; a local folder is read without asking the network for anything."""
    local = os.path.isdir(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=local)
        encoder = AutoModel.from_pretrained(model, local_files_only=local, dtype=torch.float32)
    except (ImportError, OSError, ValueError) as error:
        raise UserError(f"cannot load the model '{model}': {str(error).strip().splitlines()[0]}") from error
    if encoder.config.is_encoder_decoder:
        raise UserError(f"'{model}' has an encoder and a decoder: this example takes models with one of them")
    limit = getattr(encoder.config, "max_position_embeddings", max_length)
    if max_length > limit:
        raise UserError(f"--max-length {max_length} is more than the {limit} tokens that this model can read")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # the mean over the tokens takes its place; without it nothing is adapted in vain
    return TextClassifier(encoder, classes).to(device), tokenizer


class Batches:
    """Tokenized texts in batches of similar length, so that little time goes into padding."""

    def __init__(self, data, tokenizer, max_length, batch_size, device):
        encoded = tokenizer(data.texts, truncation=True, max_length=max_length)["input_ids"]
        self.ids = [ids or [tokenizer.pad_token_id] for ids in encoded]  # a text without tokens still has a mean
        self.labels = torch.tensor(data.labels)
        self.pad, self.batch_size, self.device = tokenizer.pad_token_id, batch_size, device

    def __len__(self):
        return math.ceil(len(self.ids) / self.batch_size)

    def batch(self, rows):
        ids = [torch.tensor(self.ids[row]) for row in rows]
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        ids = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self.pad)
        return ids.to(self.device), mask.to(self.device), self.labels[rows].to(self.device)

    def ordered(self):
        """Every row once, by length; yields (rows, batch). Each process gets its share of the batches."""
        order = sorted(range(len(self.ids)), key=lambda row: len(self.ids[row]))
        for start in processes.share(range(0, len(order), self.batch_size)):
            rows = order[start : start + self.batch_size]
            yield rows, self.batch(rows)

    def shuffled(self, generator):
        """Every row once: sorted by length inside large random chunks, then the batches in random order.

        Yields (weight, batch). Each process gets its share of the rows of every batch; with their weights the mean over
        processes is the mean over rows. One for which no row is left takes one that does not count.
        """
        order = list(range(len(self.ids)))
        generator.shuffle(order)
        chunk = 16 * self.batch_size
        chunks = (order[start : start + chunk] for start in range(0, len(order), chunk))
        order = [row for rows in chunks for row in sorted(rows, key=lambda row: len(self.ids[row]))]
        starts = list(range(0, len(order), self.batch_size))
        generator.shuffle(starts)
        for start in starts:
            rows = order[start : start + self.batch_size]
            own = processes.share(rows)
            yield len(own) * processes.count() / len(rows), self.batch(own or rows[:1])


def bar(*args, **kwargs):
    # every update is a line of its own where the output goes to a file: fewer of them there
    settings = {"leave": False, "dynamic_ncols": True, "mininterval": 0.2 if sys.stderr.isatty() else 20}
    return tqdm(*args, disable=processes.rank() > 0, **settings, **kwargs)


@torch.no_grad()
def outputs(function, batches, what):
    """What `function(ids, mask)` gives for every text, in the order of the data, on the CPU."""
    own = len(processes.share(range(len(batches))))
    parts = [(rows, function(ids, mask).cpu()) for rows, (ids, mask, _) in bar(batches.ordered(), total=own, desc=what)]
    parts = processes.gathered(parts)
    result = parts[0][1].new_empty(len(batches.ids), parts[0][1].shape[1])
    for rows, values in parts:
        result[rows] = values
    return result


def evaluate(model, batches, what="evaluate"):
    """Logits of all texts, and their accuracy."""
    model.eval()
    logits = outputs(model, batches, what)
    return logits, accuracy(logits, batches.labels)


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).float().mean().item()


def frozen_features(model, sets):
    """What the frozen encoder makes of every text, one tensor per set; the heads below need nothing else."""
    model.eval()
    return [outputs(model.features, batches, "frozen encoder") for batches in sets]


def fit_head_alike(features, sets, classes, *, epochs, lr, seed):
    """Test accuracy of a head on the frozen encoder, trained as the methods train theirs: AdamW, as many epochs."""
    x, _, test = features
    torch.manual_seed(seed)
    head = nn.Linear(x.shape[1], classes)
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(sets[0].batch_size):
            optimizer.zero_grad()
            F.cross_entropy(head(x[rows]), sets[0].labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return accuracy(head(test), sets[2].labels)


def fit_head(model, features, sets):
    """Solve for the best head on the frozen encoder: the hard baseline, and the point from which every method starts.

    The problem is convex and small, so it is solved rather than iterated a few times: a baseline that is merely
    under-trained would make any adapter look good. The weight decay is picked on the validation set.
    """
    (x, held_out, _), (train, validation, _) = features, sets
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    x, held_out = (x - mean) / scale, (held_out - mean) / scale
    best = (-1.0, None, None)
    for decay in (1e-2, 3e-3, 1e-3, 3e-4):
        weight = torch.zeros_like(model.classifier.weight, device="cpu", requires_grad=True)
        bias = torch.zeros_like(model.classifier.bias, device="cpu", requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss(weight=weight, bias=bias, optimizer=optimizer, decay=decay):
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(x, weight, bias), train.labels) + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        with torch.no_grad():
            score = accuracy(F.linear(held_out, weight, bias), validation.labels)
        if score > best[0]:
            best = (score, weight.detach(), bias.detach())
    score, weight, bias = best
    with torch.no_grad():
        model.classifier.weight.copy_(weight / scale)
        model.classifier.bias.copy_(bias - (weight / scale) @ mean)
    return score


@dataclass
class History:
    losses: list[float] = field(default_factory=list)  # one per step
    steps: list[int] = field(default_factory=list)  # where the validation set was evaluated
    validation_losses: list[float] = field(default_factory=list)
    validation_accuracies: list[float] = field(default_factory=list)
    seconds: float = 0.0  # training only, without the evaluations


def train(model, train_set, validation, *, epochs, lr, head_lr, seed):
    """AdamW with warm-up and linear decay; validates after each epoch (the last epoch is the result)."""
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    body = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]
    optimizer = torch.optim.AdamW([{"params": body, "lr": lr}, {"params": head, "lr": head_lr}], weight_decay=0.0)
    total = epochs * len(train_set)
    warmup = max(1, total // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (total - step) / max(1, total - warmup))
    )
    history, generator = History(), random.Random(seed)
    device = train_set.device
    averaging = processes.averaging(model, device)
    if processes.rank():
        torch.manual_seed(seed + processes.rank())  # dropout of its own

    def validate(epoch):
        logits, score = evaluate(model, validation, "validation")
        history.steps.append(len(history.losses))
        history.validation_losses.append(F.cross_entropy(logits, validation.labels).item())
        history.validation_accuracies.append(score)
        return f"epoch {epoch}/{epochs}: validation accuracy {score:.1%}"

    tqdm.write(validate(0) + " (frozen encoder, best head)")
    for epoch in range(1, epochs + 1):
        model.train()
        started, first, right, seen = time.perf_counter(), len(history.losses), 0.0, 0.0
        progress = bar(train_set.shuffled(generator), total=len(train_set), desc=f"epoch {epoch}/{epochs}")
        for weight, (ids, mask, labels) in progress:
            logits = averaging(ids, mask)
            loss = F.cross_entropy(logits, labels) * weight
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(body + head, 1.0)
            optimizer.step()
            schedule.step()
            hits = (logits.argmax(1) == labels).sum().item()
            numbers = loss.item(), bool(weight) * hits, bool(weight) * len(labels)
            summed, hits, rows = processes.total(*numbers, device=device)
            history.losses.append(summed / processes.count())
            right, seen = right + hits, seen + rows
            progress.set_postfix(loss=f"{history.losses[-1]:.3f}", accuracy=f"{right / seen:.1%}", refresh=False)
        seconds = time.perf_counter() - started
        history.seconds += seconds
        mean = sum(history.losses[first:]) / len(train_set)
        tqdm.write(f"{validate(epoch)}, training loss {mean:.3f}, {right / seen:.1%} right, {seconds:.0f} s")
    return history
