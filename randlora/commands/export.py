"""``python -m randlora export``: an adapter as LoRA, or a model folder with the adapter merged into its weights."""

from __future__ import annotations

import argparse
from typing import Any

from . import export_lora, export_merged
from .options import DTYPES, Failed, paragraph

EXAMPLE = export_lora.EXAMPLE


def add_options(commands: Any) -> None:
    command = commands.add_parser(
        "export",
        help="an adapter as LoRA, or merged into the model's files",
        description=paragraph(
            "Writes a saved adapter in a form that others load: as LoRA, which PEFT and servers take, or as a whole "
            "model with the adapter in its weights."
        ),
        epilog=f"examples:\n  {export_lora.EXAMPLE}\n  {export_merged.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("adapter", help="the adapter's folder, or an id of the Hugging Face hub")
    into = command.add_mutually_exclusive_group(required=True)
    into.add_argument("--lora", action="store_true", help="write an adapter of LoRA; prints what that loses")
    into.add_argument("--merged", action="store_true", help="write a model folder, in the memory of one weight")
    add("--output", required=True, metavar="FOLDER", help="where to write; it must not exist, or be empty")
    add("--model", metavar="ID", help="the base model: a folder or an id of the hub (default: the adapter's own)")
    add("--adapter-name", default="default", metavar="NAME", help="of several in the folder: the one of this name")
    add(
        "--dtype",
        choices=DTYPES,
        help="of the numbers that are written (default: float32 for LoRA, the base's for --merged)",
    )
    export_lora.add_options(command.add_argument_group("with --lora"))
    export_merged.add_options(command.add_argument_group("with --merged"))


def run(arguments: argparse.Namespace) -> int:
    way, other, name = (
        (export_lora, export_merged, "--merged") if arguments.lora else (export_merged, export_lora, "--lora")
    )
    for option in other.OPTIONS:
        if (given := getattr(arguments, option)) is not None and given is not False:
            raise Failed(f"--{option.replace('_', '-')} is for {name}")
    status: int = way.run(arguments)
    return status
