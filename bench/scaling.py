"""What would many GPUs take? Memory and time per GPU of Llamas on 1 to 512 GPUs with each engine: computed.

Nothing is run. A rank's memory and operations are those that ``randlora.estimate`` tells and a call without numbers
shows (bench/scaling_model.py); how an engine lays a model over GPUs, what it sends and what it can do meanwhile are
rules (bench/scaling_engines.py); what a GPU and a link can do are measured numbers, read from bench/results, and
assumed ones (bench/scaling_rates.py has the table of both, and where a number that gets measured is to be entered).

The results, a CSV, pictures and what they were calculated with, go to bench/results/computed-<gpu>/; those of a quick
run only where --results says so.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python bench/scaling.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from bench import measure, records, scaling_rates
from bench.scaling_engines import ENGINES, Case, memory, plans, step
from bench.scaling_model import LORA, METHODS, MODELS, PUBLISHED
from bench.scaling_rates import FOLDERS, RESERVE

GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUICK_MODELS, QUICK_GPUS = PUBLISHED[:1], (1, 2, 8, 64, 512)


def rows(case: Case, gpus: Sequence[int], gpu: str) -> list[dict[str, Any]]:
    """Of one model: a row per number of GPUs, engine and method."""
    capacity = scaling_rates.of(gpu).memory - RESERVE
    found = []
    for count in gpus:
        for plan in plans(count, MODELS[case.model].full.depth):
            model = case.call(plan)
            for method in METHODS:
                parts, taken = memory(case, plan, method), step(case, plan, method, gpu)
                total = sum(parts.values())
                found.append({
                    "model": case.model, "tokens": case.tokens, "sequence": case.sequence, "r": case.r,
                    "checkpointed": "yes" if case.checkpointing else "no",
                    "lora_rank": model.adapters[method].told["rank"] if method == LORA else "",
                    "gpus": count, "engine": plan.engine, "method": method,
                    **{f"{part}_MiB": _mebibytes(size) for part, size in parts.items()},
                    "total_MiB": _mebibytes(total), "fits": "yes" if total <= capacity else "no",
                    "computing_ms": f"{1e3 * taken.computing:.5g}",
                    "communicating_ms": f"{1e3 * taken.communicating:.5g}", "step_ms": f"{1e3 * taken.seconds:.5g}",
                    "sent_MiB": _mebibytes(taken.sent),
                })  # fmt: skip
    return sorted(found, key=lambda row: (ENGINES.index(row["engine"]), METHODS.index(row["method"]), row["gpus"]))


def _mebibytes(count: float) -> str:
    return f"{count / 2**20:.3f}".rstrip("0").rstrip(".")


def write(folder: Path, gpu: str, found: Sequence[dict[str, Any]], command: str) -> Path:
    """The CSV, and what it was calculated with beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    rates = scaling_rates.of(gpu)
    environment = records.environment("cpu")
    said = {
        "name": gpu, "gpu": rates.name, "memory_GiB": rates.memory >> 30, "reserve_GiB": RESERVE / 2**30,
        "memories_GiB": {each: scaling_rates.of(each).memory >> 30 for each in FOLDERS}, "command": command,
        **{key: environment[key] for key in ("date", "commit", "randlora", "torch")},
        "numbers": [asdict(number) for number in rates.numbers],
    }  # fmt: skip
    (folder / "computed.json").write_text(json.dumps(said, indent=2) + "\n")
    path = folder / "scaling.csv"
    records.write(path, found[0], found)
    return path


def show(gpu: str, found: Sequence[dict[str, Any]]) -> None:
    from bench import scaling_views

    rates = scaling_rates.of(gpu)
    texts = [{key: str(value) for key, value in row.items()} for row in found]
    for own in scaling_views.models(texts).values():
        print(f"\n{scaling_views.title(own)}; {gpu.upper()}, {rates.memory >> 30} GiB: computed, not measured")
        asked = ", ".join(map(str, sorted({row["gpus"] for row in found})))
        print(f"  memory and seconds per step of a GPU; fits: on how many of {asked} GPUs")
        head, lines = scaling_views.table(own)
        widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
        for line in (head, *lines):
            print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _counts(text: str) -> tuple[int, ...]:
    try:
        counts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"numbers with commas between them, got {text!r}") from None
    for count in counts:
        if count < 1 or count & (count - 1):
            raise argparse.ArgumentTypeError(f"numbers of GPUs are powers of two, got {count}")
    return counts


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m bench scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--quick", action="store_true", help=f"{QUICK_MODELS[0]} and few numbers of GPUs; nothing is written by default"
    )
    add("--gpu", choices=FOLDERS, action="append", help="default: each of them")
    add("--gpus", type=_counts, metavar="N,N", help="numbers of GPUs, powers of two (default: 1,2,4 to 512)")
    add("--model", choices=MODELS, action="append", help=f"default: {', '.join(PUBLISHED)}")
    add("--tokens-per-gpu", type=int, default=8192, metavar="N", help="of a step (default: %(default)s)")
    add("--sequence", type=int, default=1024, metavar="N", help="tokens of a sequence (default: %(default)s)")
    add("--rank", type=int, default=32, metavar="R", help="r of RandLoRA; LoRA gets as many numbers (default: 32)")
    add("--no-checkpointing", action="store_true", help="blocks keep what their backward needs")
    add("--no-picture", action="store_true", help="`python -m bench plots` draws it later")
    add("--results", type=Path, metavar="FOLDER", help="default: bench/results; of a quick run: none")
    options = parser.parse_args(argv)
    for name in ("tokens_per_gpu", "sequence", "rank"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")
    if options.tokens_per_gpu % options.sequence:
        parser.error(
            f"--tokens-per-gpu must be a multiple of --sequence, got {options.tokens_per_gpu} and {options.sequence}"
        )
    names = options.model or (QUICK_MODELS if options.quick else PUBLISHED)
    gpus = options.gpus or (QUICK_GPUS if options.quick else GPUS)
    results = options.results or (None if options.quick else records.RESULTS)
    command = shlex.join(["python", "-m", "bench", "scaling", *measure.without(argv, "--results")])
    for gpu in options.gpu or FOLDERS:
        found = []
        for name in tqdm(names, desc=gpu, unit="model", leave=False, disable=None):
            case = Case(name, options.tokens_per_gpu, options.sequence, options.rank, not options.no_checkpointing)
            found += rows(case, gpus, gpu)
        show(gpu, found)
        if results is not None:
            path = write(results / f"computed-{gpu}", gpu, found, command)
            print(f"\n{path}")
            if not options.no_picture:
                from bench import scaling_views  # matplotlib takes seconds to load

                scaling_views.draw(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
