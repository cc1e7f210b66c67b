"""``python -m randlora check-peft``: whether the installed PEFT and randlora agree."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from .. import __version__
from ..integrations import peft as integration
from .options import Failed


def add_options(commands: Any) -> None:
    commands.add_parser(
        "check-peft",
        help="whether the installed PEFT and randlora agree",
        description="Adapts a tiny model with the RandLoRA of the installed PEFT, and with randlora enabled in it, and "
        "compares the two: bases, outputs, gradients, merging, state dicts, and files that one writes and the other "
        "reads. Takes about a second on the CPU. randlora.integrations.peft.enable() does the same by itself for a "
        "version of PEFT that it is not tested with.",
        epilog="exit status: 0 if all agrees, 1 if something differs, 2 without PEFT",
    )


def run(arguments: argparse.Namespace) -> int:
    try:
        version = integration.version_of_peft()
    except ImportError as error:
        raise Failed(str(error)) from error
    known = "tested" if integration.is_tested(version) else "not tested"
    print(f"randlora {__version__} and the RandLoRA of PEFT {version} ({known}), torch {torch.__version__}\n")
    found = integration.compare()
    width = max(map(len, found))
    for what, difference in found.items():
        print(f"{what:{width}}  {'equal' if difference is None else f'DIFFERS: {difference}'}")
    differing = sum(difference is not None for difference in found.values())
    print(f"\n{differing} of {len(found)} differ" if differing else "\nall agrees")
    return int(differing > 0)
