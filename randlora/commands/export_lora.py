"""``python -m randlora export --lora``: the adapter as one of LoRA."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..config import RandLoraConfig
from ..export.lora import to_lora
from ..export.source import adapter_folder, base_name
from ..model.of_config import transformers_config
from .options import DTYPES, Failed

EXAMPLE = "python -m randlora export my-adapter --lora --output my-lora --rank 64"
RANDOM = "random"
_RANDOM_TOKENS, _MOST_TOKENS = 64, 512


def add_options(group: Any) -> None:
    add = group.add_argument
    add("--rank", type=int, metavar="R", help="rank of LoRA (default: that of the update, which is exact, up to 512)")
    add("--energy", type=float, metavar="SHARE", help="the smallest rank that keeps this share of each update: 0.99")
    add("--per-layer", action="store_true", help="a rank for each layer, as small as it can be")
    add("--adapter-name", default="default", metavar="NAME", help="of several in the folder: the one of this name")
    add(
        "--inputs", metavar="FILE",
        help=f"compare outputs on this text file, or on {RANDOM!r}: 64 random tokens; the base model is loaded for it",
    )  # fmt: skip
    add("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    try:
        result = to_lora(
            arguments.adapter, arguments.output, arguments.rank, arguments.energy, arguments.adapter_name,
            arguments.model, per_layer=arguments.per_layer, dtype=DTYPES[arguments.dtype or "float32"],
            inputs=None if arguments.inputs is None else _tokens(arguments), progressbar=not arguments.json,
        )  # fmt: skip
    except (ImportError, OSError) as error:
        raise Failed(str(error)) from error
    print(json.dumps(result, indent=2) if arguments.json else result)
    return 0


def _tokens(arguments: argparse.Namespace) -> torch.Tensor:
    """``[1, tokens]``: those of the text, up to 512, or 64 random ones."""
    folder = adapter_folder(arguments.adapter, arguments.adapter_name)
    name = base_name(folder, RandLoraConfig.from_pretrained(folder), arguments.model)
    if arguments.inputs == RANDOM:
        words = transformers_config(name).get_text_config().vocab_size
        return torch.randint(0, words, (1, _RANDOM_TOKENS), generator=torch.Generator().manual_seed(0))
    text = Path(arguments.inputs).read_text(encoding="utf-8")
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of transformers, huggingface_hub or the network
        raise Failed(f"no tokenizer for {name!r}, give --inputs {RANDOM}: {error}") from error
    ids: torch.Tensor = tokenizer(text, return_tensors="pt")["input_ids"][:, :_MOST_TOKENS]
    if not ids.numel():
        raise Failed(f"--inputs: {arguments.inputs} has no text")
    return ids
