"""A training step of a whole model: what does every method add to it, in time and in memory?

Forward, backward and AdamW on random inputs, r = 32. The models have the sizes of known ones and random weights; on the
CPU they have fewer layers and words, and smaller batches, as every title says (``bench/shapes.py``). The output of the
embeddings requires a gradient, as inside a deep model; "frozen" is forward and backward without anything to train.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python bench/model.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import measure, methods, questions, records
from bench.floors import Work
from bench.measure import Comparison
from bench.methods import METHODS, Setting
from bench.questions import Case, Columns, Setup
from bench.shapes import PUBLISHED, SHAPES, Shape, Size, multiplies_bfloat16
from bench.training import Training

BASELINE = "PEFT LoRA"
KEY = ("model", "depth", "vocab", "batch", "tokens", "dtype", "targets", "r")
QUICK_MODELS = ("MiniLM-L6", "Llama-3.2-3B")
QUICK_METHODS = ("frozen", BASELINE, "PEFT RandLoRA", "PyTorch", "randlora", "randlora very_sparse")


def add_options(parser: argparse.ArgumentParser, known_methods=METHODS, known_models=SHAPES) -> None:
    """Which model, how much of it, and which methods; ``memory.py`` and ``generate.py`` have them too."""
    add = parser.add_argument
    add("--model", metavar="NAME,...", help=f"of {', '.join(known_models)} (default: all; --quick: some)")
    add("--methods", metavar="NAME;...", help=f"of {'; '.join(known_methods)} (default: all; --quick: some)")
    add("--depth", type=int, help="layers")
    add("--vocab", type=int, help="words")
    add("--batch", type=int, help="samples")
    add("--tokens", type=int, help="tokens of a sample, of a language model")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the model (default: as published; fp32 on a CPU without bf16)",
    )
    add("--targets", metavar="NAME,...", help="layers that get adapters, by the ends of their names, or all-linear")
    add("--rank", type=int, default=32, help="default: 32")


def chosen(text: str | None, known: Any, default: Any, separator: str, what: str) -> list[str]:
    """The names in `text`, checked."""
    names = list(default) if text is None else [name.strip() for name in text.split(separator)]
    for name in names:
        if name not in known:
            raise SystemExit(f"no {what} is named {name!r}; there are: {f'{separator} '.join(known)}")
    return names


def models(options: argparse.Namespace, default: Any, **sizes: int) -> Iterator[tuple]:
    """Shape, size, setting and title of each model that the options ask for; `sizes` come before the options'."""
    for name in chosen(options.model, SHAPES, default, ",", "model"):
        shape = SHAPES[name]
        changes = {field: getattr(options, field) for field in ("depth", "vocab", "batch", "tokens")} | sizes
        if options.dtype:
            changes["dtype"] = getattr(torch, options.dtype)
        elif not multiplies_bfloat16(options.device):
            changes["dtype"] = torch.float32
        if shape.image:
            changes["tokens"] = changes["vocab"] = None
        size = shape.size(options.device, **changes)
        if options.quick and torch.device(options.device).type == "cpu":
            size = dataclasses.replace(size, batch=changes["batch"] or max(1, min(size.batch // 2, 4)))
        targets = shape.targets
        if options.targets:
            targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
        setting = shape.setting(size, targets=targets, rank=options.rank)
        yield shape, size, setting, f"{shape.title(size)}, r = {options.rank}"


def columns(shape, size, setting) -> dict[str, Any]:
    targets = setting.targets if isinstance(setting.targets, str) else " ".join(setting.targets)
    return shape.columns(size) | {"targets": targets, "r": setting.rank}


def table(found: dict[str, dict[str, Any]]) -> str:
    width = max(map(len, found), default=0)
    lines = [f"  {'':{width}}  {'trained':>12}  {'peak MiB':>9}  {'kept MiB':>9}  {'tokens/s':>9}"]
    for name, row in found.items():
        peak, saved = (f"{row[key] / 2**20:.1f}" if key in row else "-" for key in ("peak_bytes", "saved_bytes"))
        tokens = row["tokens_per_second"]
        lines.append(f"  {name:{width}}  {row['trainable_parameters']:12,}  {peak:>9}  {saved:>9}  {tokens:9,}")
    return "\n".join(lines)


def case(shape: Shape, size: Size, setting: Setting, title: str, options: argparse.Namespace) -> Case:
    usual = [name for name in methods.suitable(size.dtype) if not options.quick or name in QUICK_METHODS]
    names = chosen(options.methods, METHODS, usual, ";", "method")

    def set_up() -> Setup:
        torch.compiler.reset()
        training = Training(shape, size, setting, options.device)
        linear = [module for module in training.model.modules() if isinstance(module, torch.nn.Linear)]
        weights = sum(module.weight.nbytes for module in linear)

        def extra(result: Comparison) -> tuple[Columns, bool]:
            done = [name for name, timing in result.timings.items() if timing.samples]
            found = {name: dict(training.found[name]) for name in done}
            for name, row in found.items():
                row["tokens_per_second"] = round(size.batch * size.tokens / result.timings[name].median)
            stopped = result.interrupted
            if not options.quick and not stopped:
                stopped = questions.add_peaks(found, done, training.peak_bytes)
            print(table(found))
            return found, stopped

        return Setup(
            {name: functools.partial(training.provider, name) for name in names},
            baseline=BASELINE if BASELINE in names else names[0],
            check=training.check,
            dtype=size.dtype,
            # Of the frozen model, whose weights are read forward and backward: no method can do without.
            work=Work(training.multiply_adds(), 2 * weights),
            extra=extra,
        )

    return Case(title, columns(shape, size, setting), set_up)


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("model", __doc__, argv, add=add_options)
    cases = [case(*one, options) for one in models(options, QUICK_MODELS if options.quick else PUBLISHED)]
    questions.answer(records.Book("model", KEY, options), cases, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
