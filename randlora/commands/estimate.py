"""``python -m randlora estimate``: what an adapter will cost, before training."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..bases.definition import KINDS
from ..config import RandLoraConfig
from ..estimation.estimate import estimate
from ..model.of_config import model_of_config
from ..planner import STRATEGIES
from .options import DTYPES, Failed, asked_layers, paragraph

EXAMPLE = "python -m randlora estimate --model meta-llama/Llama-3.2-3B --target-modules q_proj,v_proj --tokens 840"


def add_options(commands: Any) -> None:
    command = commands.add_parser(
        "estimate",
        help="what an adapter will cost in memory, operations and disk, before training",
        description=paragraph(
            "What training a model with RandLoRA takes beyond the frozen model, for each kind of bases, and what LoRA "
            "with as many parameters does. Needs transformers, and of the model its config.json only: no weights are "
            "loaded and no bases are made."
        ),
        epilog=f"example:\n  {EXAMPLE} --dtype bfloat16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--model", required=True, metavar="ID", help="a folder with a config.json, or an id of the Hugging Face hub")
    add("--tokens", required=True, type=int, metavar="N", help="tokens of a step in all, batch times sequence")
    add("--rank", type=int, default=32, metavar="R", help="rank of one base (default: 32)")
    add(
        "--target-modules", metavar="NAMES",
        help="layers to adapt, separated by commas, or all-linear (default: PEFT's for this architecture)",
    )  # fmt: skip
    add(
        "--target-parameters", metavar="NAMES",
        help="weights of fused experts to adapt, separated by commas; --target-modules '' adapts these alone",
    )  # fmt: skip
    add("--dtype", choices=DTYPES, help="of the model's weights (default: what its config says, or float32)")
    add("--autocast", choices=["bfloat16", "float16"], help="where it is trained under torch.autocast")
    add("--device", help="cpu or cuda (default: cuda if there is any)")
    add("--kind", nargs="+", choices=KINDS, metavar="KIND", help=f"of {', '.join(KINDS)} (default: all)")
    add("--sparsity", type=float, metavar="Z", help="of the one sparse KIND: zero with probability 1 - 1/Z")
    add("--num-bases", type=int, metavar="N", help="bases per layer (default: as many as full rank takes)")
    add("--dropout", type=float, default=0.0, metavar="P", help="on the update's input (default: 0)")
    add("--strategy", choices=["auto", *STRATEGIES], default="auto", help="how layers compute (default: auto)")
    add("--no-projections", action="store_true", help="save the adapter without its bases (save_projection=False)")
    add("--no-kept-bases", action="store_true", help="dense bases are made anew in every pass (randlora.keep_bases)")
    add("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    targets, parameters = asked_layers(arguments)
    if arguments.sparsity is not None and len(arguments.kind or ()) != 1:
        raise Failed("--sparsity is that of one kind: name it with --kind sparse or --kind very_sparse")
    config = RandLoraConfig(
        r=arguments.rank, target_modules=targets, target_parameters=parameters,
        kind=arguments.kind[0] if arguments.kind else None,
        sparsity=arguments.sparsity, num_bases=arguments.num_bases, randlora_dropout=arguments.dropout,
        strategy=arguments.strategy, save_projection=not arguments.no_projections,
    )  # fmt: skip
    if arguments.tokens < 1:
        raise Failed(f"--tokens must be at least 1, got {arguments.tokens}")
    try:
        model = model_of_config(arguments.model, DTYPES.get(arguments.dtype))
    except ImportError as error:
        raise Failed(str(error)) from error
    result = estimate(
        model, config, arguments.tokens, kinds=arguments.kind, device=arguments.device,
        autocast=DTYPES.get(arguments.autocast), keep_bases=not arguments.no_kept_bases,
    )  # fmt: skip
    print(json.dumps(result, indent=2) if arguments.json else f"{arguments.model}\n{result}")
    return 0
