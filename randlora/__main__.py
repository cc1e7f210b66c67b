"""The command line, ``python -m randlora``: what an adapter will cost, and whether the installed PEFT agrees."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import RandLoraConfig, __version__
from .bases.definition import KINDS
from .estimation.estimate import estimate
from .integrations import peft as integration
from .planner import STRATEGIES

if TYPE_CHECKING:
    from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
EXAMPLE = "python -m randlora estimate --model meta-llama/Llama-3.2-3B --target-modules q_proj,v_proj --tokens 840"


class Failed(Exception):
    """What the user can mend: one line, without a traceback."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        return COMMANDS[arguments.command](arguments)
    except (Failed, TypeError, ValueError) as error:
        print(f"python -m randlora {arguments.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m randlora",
        description="RandLoRA for PyTorch: full-rank adapters with random bases.",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"randlora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", title="commands")
    command = commands.add_parser(
        "estimate",
        help="what an adapter will cost in memory, operations and disk, before training",
        description="What training a model with RandLoRA takes beyond the frozen model, for each kind of bases, and "
        "what LoRA with as many parameters does. Needs transformers, and of the model its config.json only: no weights "
        "are loaded and no bases are made.",
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
    commands.add_parser(
        "check-peft",
        help="whether the installed PEFT and randlora agree",
        description="Adapts a tiny model with the RandLoRA of the installed PEFT, and with randlora enabled in it, and "
        "compares the two: bases, outputs, gradients, merging, state dicts, and files that one writes and the other "
        "reads. Takes about a second on the CPU. randlora.integrations.peft.enable() does the same by itself for a "
        "version of PEFT that it is not tested with.",
        epilog="exit status: 0 if all agrees, 1 if something differs, 2 without PEFT",
    )
    return parser


def _estimate(arguments: argparse.Namespace) -> int:
    targets = arguments.target_modules
    if targets is not None and targets != "all-linear":
        targets = _names(targets)
    parameters = None if arguments.target_parameters is None else _names(arguments.target_parameters)
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
    model = build(arguments.model, DTYPES.get(arguments.dtype))
    result = estimate(
        model, config, arguments.tokens, kinds=arguments.kind, device=arguments.device,
        autocast=DTYPES.get(arguments.autocast), keep_bases=not arguments.no_kept_bases,
    )  # fmt: skip
    print(json.dumps(result, indent=2) if arguments.json else f"{arguments.model}\n{result}")
    return 0


def _check_peft(arguments: argparse.Namespace) -> int:
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


COMMANDS = {"estimate": _estimate, "check-peft": _check_peft}


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def build(name: str, dtype: torch.dtype | None = None) -> nn.Module:
    """The model that a ``config.json`` describes, on the meta device: shapes without numbers.

    Args:
        name: a folder, or an id of the Hugging Face hub. dtype: of its weights; default: what the config says.

    Raises:
        Failed: transformers is not installed, there is no such config, or it describes no model of transformers.
    """
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise Failed(f"the folder {name!r} has no config.json")
    try:
        import transformers
    except ImportError as error:
        raise Failed("it takes transformers to build a model: pip install transformers") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except Exception as error:  # of transformers, huggingface_hub or the network
        where = "" if os.path.isdir(name) else "; it is no folder here, and the hub could not give it"
        raise Failed(f"no config for {name!r}{where}: {_first_line(error)}") from error
    cls = getattr(transformers, (config.architectures or [""])[0], None)
    model: torch.nn.Module
    try:
        with torch.device("meta"):
            if cls is not None:
                model = cls(config)
            elif type(config) in transformers.AutoModelForCausalLM._model_mapping:
                model = transformers.AutoModelForCausalLM.from_config(config)
            else:
                model = transformers.AutoModel.from_config(config)
    except Exception as error:  # whatever a class makes of the config
        raise Failed(f"no model can be made of the config of {name!r}: {_first_line(error)}") from error
    said = vars(config).get("dtype", vars(config).get("torch_dtype"))  # the first since transformers 4.56
    return model.to(dtype or (said if isinstance(said, torch.dtype) else torch.float32))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


if __name__ == "__main__":
    raise SystemExit(main())
