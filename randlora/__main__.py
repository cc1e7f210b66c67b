"""The command line, ``python -m randlora``: what to set, what it will cost, where it goes, and whether PEFT agrees."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .commands import check_peft, estimate, export, suggest
from .commands.options import Failed

COMMANDS: dict[str, Any] = {"suggest": suggest, "estimate": estimate, "export": export, "check-peft": check_peft}


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return int(COMMANDS[arguments.command].run(arguments))
    except (Failed, TypeError, ValueError) as error:
        print(f"python -m randlora {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m randlora",
        description="RandLoRA for PyTorch: full-rank adapters with random bases.",
        epilog=f"examples:\n  {suggest.EXAMPLE}\n  {estimate.EXAMPLE}\n  {export.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"randlora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    for command in COMMANDS.values():
        command.add_options(commands)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
