"""``python -m randlora export --merged``: the base model's files with the adapter in their weights."""

from __future__ import annotations

import argparse
from typing import Any

from ..export.merged import to_merged
from .options import DTYPES, Failed, progressbar

EXAMPLE = "python -m randlora export my-adapter --merged --output my-model"
OPTIONS = ("max_shard_size",)
_SHARD_SIZE = "5GB"


def add_options(group: Any) -> None:
    group.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help=f"of one file of weights (default: {_SHARD_SIZE}); it takes no memory",
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        to_merged(
            arguments.adapter, arguments.output, arguments.adapter_name, arguments.model,
            dtype=DTYPES.get(arguments.dtype), max_shard_size=arguments.max_shard_size or _SHARD_SIZE,
            progressbar=progressbar(),
        )  # fmt: skip
    except (ImportError, OSError) as error:
        raise Failed(str(error)) from error
    print(f"{arguments.output} has the merged model")
    return 0
