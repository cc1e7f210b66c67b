"""``python -m randlora suggest``: what to set for a model, what that costs, and what was measured."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..bases.definition import KINDS
from ..suggestion.suggest import USUAL_KINDS, USUAL_RANKS, suggest
from .options import DTYPES, Failed, asked_layers, paragraph

EXAMPLE = "python -m randlora suggest --model meta-llama/Llama-3.2-3B --budget bytes"
BUDGETS = """
budgets:
  numbers     trained numbers, and so the adapter's file without its bases
  bytes       memory of training, beyond the frozen model and what it needs itself
  seconds     of a training step
The suggestion is what takes the least of it among what is as good. With a limit,
as in numbers=2e6, bytes=8GiB or seconds=1.2x (times as long as a step of the
frozen model), all that is within it is weighed alike, as everything is without.
"""


def add_options(commands: Any) -> None:
    command = commands.add_parser(
        "suggest",
        help="what to set for a model, with what it costs and what was measured",
        description=paragraph(
            "Suggests a kind of bases, rank, alpha, learning rate and layers for a model, beside what others and LoRA "
            "would cost. Needs transformers, and of the model its config.json only: no weights are loaded and no bases "
            "are made."
        ),
        epilog=f"{BUDGETS}\nexample:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", required=True, metavar="ID", help="a folder with a config.json, or an id of the Hugging Face hub")
    add("--budget", metavar="WHAT", help="what there is little of, see below (default: all weighed alike)")
    add("--tokens", type=int, default=2048, metavar="N", help="tokens of a step in all (default: 2048)")
    add(
        "--target-modules", metavar="NAMES",
        help="layers to adapt, separated by commas (default: all-linear, or attention's queries and values)",
    )  # fmt: skip
    add(
        "--target-parameters", metavar="NAMES",
        help="weights of fused experts to adapt, separated by commas; --target-modules '' adapts these alone",
    )  # fmt: skip
    add(
        "--kind", nargs="+", choices=KINDS, metavar="KIND",
        help=f"to choose from, of {', '.join(KINDS)} (default: {', '.join(USUAL_KINDS)})",
    )  # fmt: skip
    add(
        "--rank", nargs="+", type=int, metavar="R",
        help=f"ranks to choose from (default: {', '.join(map(str, USUAL_RANKS))})",
    )  # fmt: skip
    add("--dtype", choices=DTYPES, help="of the model's weights (default: what its config says, or float32)")
    add("--autocast", choices=["bfloat16", "float16"], help="where it is trained under torch.autocast")
    add("--device", help="cpu or cuda (default: cuda if there is any)")
    add("--json", action="store_true", help="print all of it as JSON")


def run(arguments: argparse.Namespace) -> int:
    targets, parameters = asked_layers(arguments)
    try:
        result = suggest(
            arguments.model, arguments.budget, tokens=arguments.tokens, target_modules=targets,
            target_parameters=parameters, kinds=arguments.kind, ranks=arguments.rank,
            dtype=DTYPES.get(arguments.dtype), device=arguments.device, autocast=DTYPES.get(arguments.autocast),
        )  # fmt: skip
    except ImportError as error:
        raise Failed(str(error)) from error
    print(json.dumps(result.to_dict(), indent=2) if arguments.json else f"{arguments.model}\n\n{result}")
    return 0
