"""A training step of a whole model: what does RandLoRA add to it, next to LoRA and full fine-tuning?

Forward, backward and AdamW on random tokens; the models have the sizes of known ones and random weights. Adapters sit
on all linear layers of the encoder, r = 32, fp32.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: python bench/model.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import nn

from bench import measure, plots, records
from bench.measure import Provider

RANK = 32
BASELINE = "PEFT LoRA"
# model, batch, tokens per sample
CASES = (("MiniLM-L6", 32, 128),)
TARGETS = {"MiniLM-L6": ["query", "key", "value", "dense"]}


def build(name: str) -> nn.Module:
    """The model with random weights, in training mode."""
    import transformers

    if name == "MiniLM-L6":
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        return transformers.BertModel(config, add_pooling_layer=False).train()
    raise ValueError(f"unknown model {name}")


class Case:
    def __init__(self, name: str, batch: int, tokens: int, device: str) -> None:
        self.name, self.device = name, device
        torch.manual_seed(0)
        self.ids = torch.randint(0, 30000, (batch, tokens), device=device)

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return build(self.name).to(self.device)

    def step(self, model: nn.Module) -> Provider:
        """A provider that takes a training step of what is trainable in `model`."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

        def run() -> torch.Tensor:
            loss = model(input_ids=self.ids).last_hidden_state.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return Provider(run)

    def check(self, loss: torch.Tensor) -> None:
        assert torch.isfinite(loss), f"loss {loss}"


def frozen_forward(case: Case) -> Provider:
    model = case.model().requires_grad_(False)
    return Provider(lambda: model(input_ids=case.ids).last_hidden_state.mean())


def full(case: Case) -> Provider:
    return case.step(case.model())


def peft(case: Case, config_name: str) -> Provider:
    import peft

    config = getattr(peft, config_name)(r=RANK, target_modules=TARGETS[case.name])
    return case.step(peft.get_peft_model(case.model(), config))


def ours(case: Case, **settings) -> Provider:
    import randlora

    model = case.model().requires_grad_(False)
    names = [n for n, m in model.named_modules() if n.rsplit(".", 1)[-1] in TARGETS[case.name]]
    for name in names:
        model.set_submodule(name, randlora.Linear(model.get_submodule(name), r=RANK, **settings))
    return case.step(model)


def providers() -> dict[str, Callable[[Case], Provider]]:
    return {
        "randlora": ours,
        BASELINE: functools.partial(peft, config_name="LoraConfig"),
        "PEFT RandLoRA": functools.partial(peft, config_name="RandLoraConfig"),
        "full fine-tuning": full,
        "floor: frozen, forward only": frozen_forward,
    }


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("model", __doc__, argv)
    book = records.Book("model", ("model", "batch", "tokens", "r"), options)
    for name, batch, tokens in CASES:
        title = f"{name}, {batch} x {tokens} tokens"
        if options.only and options.only not in title:
            continue
        print(f"{title}, r = {RANK}")
        case = Case(name, batch, tokens, options.device)
        result = measure.compare(
            title,
            {provider: functools.partial(make, case) for provider, make in providers().items()},
            baseline=BASELINE,
            check=case.check,
            options=options,
        )
        print(measure.table(result))
        book.add({"model": name, "batch": batch, "tokens": tokens, "r": RANK}, result, {})
        if result.interrupted:
            break
    plots.draw(book.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
