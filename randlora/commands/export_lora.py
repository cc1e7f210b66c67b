"""``python -m randlora export --lora``: the adapter as one of LoRA."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..config import RandLoraConfig
from ..export.lora import to_lora
from ..export.source import adapter_folder, base_name, explained
from ..model.of_config import first_line, transformers_config
from .options import DTYPES, Failed, progressbar

EXAMPLE = "python -m randlora export my-adapter --lora --output my-lora --rank 64"
OPTIONS = ("rank", "energy", "per_layer", "inputs", "json")
RANDOM = "random"
_RANDOM_TOKENS, _MOST_TOKENS = 64, 512


def add_options(group: Any) -> None:
    add = group.add_argument
    add("--rank", type=int, metavar="R", help="rank of LoRA (default: that of the updates, which is exact, up to 512)")
    add(
        "--energy",
        type=float,
        metavar="SHARE",
        help="in place of a rank: the smallest that keeps this share of each update, such as 0.99",
    )
    add("--per-layer", action="store_true", help="a rank for each layer, as small as it can be")
    add(
        "--inputs", metavar="FILE",
        help=f"compare outputs on the text of this file, or on 64 random tokens: {RANDOM}; loads the base model",
    )  # fmt: skip
    add("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        result = to_lora(
            arguments.adapter, arguments.output, arguments.rank, arguments.energy, arguments.adapter_name,
            arguments.model, per_layer=arguments.per_layer, dtype=DTYPES[arguments.dtype or "float32"],
            inputs=None if arguments.inputs is None else _inputs(arguments), progressbar=progressbar(),
        )  # fmt: skip
    except (ImportError, OSError) as error:
        raise Failed(str(error)) from error
    print(json.dumps(result, indent=2) if arguments.json else f"{result}\n\n{arguments.output} has the adapter of LoRA")
    return 0


def _inputs(arguments: argparse.Namespace) -> torch.Tensor | dict[str, torch.Tensor]:
    """``[1, tokens]``: those of the text, up to 512, or 64 random ones; for a model with two parts both get them."""
    folder = adapter_folder(arguments.adapter, arguments.adapter_name)
    name = base_name(folder, RandLoraConfig.from_pretrained(folder), arguments.model)
    with explained(name, folder, arguments.model):
        config = transformers_config(name)
    if arguments.inputs == RANDOM:
        words = getattr(config.get_text_config(), "vocab_size", None)
        if words is None:
            raise Failed(f"--inputs: a {type(config).__name__} takes no words; to_lora(inputs=) takes what it does")
        ids = torch.randint(0, words, (1, _RANDOM_TOKENS), generator=torch.Generator().manual_seed(0))
    else:
        ids = _ids_of_text(arguments.inputs, name)
    return {"input_ids": ids, "decoder_input_ids": ids} if config.is_encoder_decoder else ids


def _ids_of_text(path: str, name: str) -> torch.Tensor:
    text = Path(path).read_text(encoding="utf-8")
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of transformers, huggingface_hub or the network
        raise Failed(f"no tokenizer for {name!r}, give --inputs {RANDOM}: {first_line(error)}") from error
    ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"][:, :_MOST_TOKENS]
    if not ids.numel():
        raise Failed(f"--inputs: {path} has no text")
    return ids
