"""What commands share."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import textwrap

import torch

from ..config import ALL_LINEAR

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Failed(Exception):
    """What the user can mend: one line, without a traceback."""


def paragraph(text: str) -> str:
    """Lines as argparse breaks them, where it is told to leave examples alone."""
    return textwrap.fill(text, 78)


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def asked_layers(arguments: argparse.Namespace) -> tuple[list[str] | str | None, list[str] | None]:
    """``--target-modules`` and ``--target-parameters`` as a config takes them; None where they were not given."""
    targets, parameters = arguments.target_modules, arguments.target_parameters
    if targets is not None and targets != ALL_LINEAR:
        targets = names(targets)
    return targets, None if parameters is None else names(parameters)


def progressbar() -> bool:
    """Whether somebody looks on, and tqdm is there to show one."""
    return sys.stderr.isatty() and importlib.util.find_spec("tqdm") is not None
