"""``python -m randlora export --merged``: the base model's files with the adapter in their weights."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from ..export.merged import to_merged
from .options import DTYPES, Failed

EXAMPLE = "python -m randlora export my-adapter --merged --output my-model"


def add_options(group: Any) -> None:
    group.add_argument(
        "--max-shard-size",
        default="5GB",
        metavar="SIZE",
        help="of one file of weights (default: 5GB); it takes no memory",
    )


def run(arguments: argparse.Namespace) -> int:
    bar = sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
    try:
        to_merged(
            arguments.adapter, arguments.output, arguments.adapter_name, arguments.model,
            dtype=DTYPES.get(arguments.dtype), max_shard_size=arguments.max_shard_size, progressbar=bar,
        )  # fmt: skip
    except (ImportError, OSError) as error:
        raise Failed(str(error)) from error
    print(f"{arguments.output} has the merged model")
    return 0
