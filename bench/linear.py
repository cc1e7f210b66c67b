"""One adapted layer: what do its forward and backward cost under every method, and which strategy should compute it?

A d -> d layer on T tokens, gradients for the input and the adapter. Without options a few cases; --d, --tokens, --rank,
--kind, --dtype and --pass measure all combinations of their values. With --grid the three strategies and the automatic
choice alone, over many d and T: does it take the best one?
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

if not __package__:  # run as a file: python bench/linear.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import layer as layers
from bench import measure, model, questions, records
from bench.layer import BOTH, FORCED, KINDS, PASSES, Layer, Spec
from bench.measure import Comparison
from bench.methods import NOT_KEPT
from bench.questions import Case, Columns, Setup
from bench.shapes import multiplies_bfloat16

BASELINE = "PEFT RandLoRA"
CASES = (
    Spec(1024, 1024), Spec(1024, 4096), Spec(768, 2048), Spec(384, 8192), Spec(1024, 1024, which="forward"),
    Spec(1024, 1024, which="backward"), Spec(1024, 1024, dtype="bfloat16"), Spec(768, 2048, dtype="bfloat16"),
)  # fmt: skip
QUICK_CASES = (Spec(1024, 1024), Spec(1024, 1024, dtype="bfloat16"))
# Of a layer that keeps a GPU busy.
CUDA_CASES = tuple(
    Spec(d, T, dtype=dtype, which=which)
    for dtype, which in (("bfloat16", BOTH), ("float32", BOTH), ("bfloat16", "forward"), ("bfloat16", "backward"))
    for d, T in ((1024, 4096), (4096, 4096))
)
GRID = {"d": (256, 512, 1024, 2048), "tokens": (16, 128, 512, 1024, 2048, 16384)}
AXES = {  # option -> field of Spec, type, what its values are
    "d": ("d", int, "sizes of the layer"),
    "tokens": ("T", int, "numbers of tokens"),
    "rank": ("r", int, "ranks of a base"),
    "kind": ("kind", ("dense", *KINDS, "sign"), "kinds of bases"),
    "dtype": ("dtype", ("float32", "bfloat16", "float16"), "dtypes"),
    "pass": ("which", ("both", *PASSES), "passes, both: forward and backward"),
}


def values(option: str, text: str) -> list:
    """The comma-separated values of an axis, checked."""
    _, kind, what = AXES[option]
    found = [part.strip() for part in text.split(",")]
    for part in found:
        if part not in kind if isinstance(kind, tuple) else not (part.isdigit() and int(part)):
            expected = ", ".join(kind) if isinstance(kind, tuple) else "positive integers"
            raise argparse.ArgumentTypeError(f"{what} are {expected}, got {part!r}")
    if option == "pass":
        return [BOTH if part == "both" else part for part in found]
    return found if isinstance(kind, tuple) else [int(part) for part in found]


def add_axes(parser: argparse.ArgumentParser) -> None:
    for option, (field, _, what) in AXES.items():
        parser.add_argument(
            f"--{option}", dest=f"axis_{field}", type=functools.partial(values, option), metavar="LIST", help=what
        )
    parser.add_argument(
        "--methods", metavar="NAME;...", help="default: all that make sense; --quick: without compilers"
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out, as --quick does")


def add_options(parser: argparse.ArgumentParser) -> None:
    add_axes(parser)
    parser.add_argument("--grid", action="store_true", help="strategies against the automatic choice")


def specs(options: argparse.Namespace, default: Sequence[Spec], over: dict[str, Iterable] | None = None) -> list[Spec]:
    """All combinations of the axes that the options give; `default` if they give none.

    Args:
        over: field -> values where the options give none of this axis, but are to be combined all the same.
    """
    given = {field: getattr(options, f"axis_{field}") for field, _, _ in AXES.values()}
    axes = (over or {}) | {field: found for field, found in given.items() if found}
    if not axes:
        return [Spec(**{**vars(spec), "device": options.device}) for spec in default]
    return [
        Spec(**dict(zip(axes, each, strict=True)), device=options.device) for each in itertools.product(*axes.values())
    ]


def case(
    question: str, spec: Spec, names: Sequence[str], options: argparse.Namespace, times_only: bool = False
) -> Case:
    """Of a layer's methods; with what each keeps, and its peak unless it is quick or asked not to be."""
    memory = not options.quick and not options.no_memory and spec.which != "backward"

    def set_up() -> Setup:
        torch.compiler.reset()  # every case is the compiler's first
        made = Layer(spec)

        def extra(result: Comparison) -> tuple[Columns, bool]:
            done = [name for name, timing in result.timings.items() if timing.samples]
            found = {name: {"saved_bytes": made.saved[name]} for name in done}
            if "randlora" in found:
                found["randlora"]["bases_bytes"] = made.bases_bytes
            if NOT_KEPT in found:
                found[NOT_KEPT]["bases_bytes"] = 0  # between calls; in one they are among what its peak counts
            if BASELINE in found:
                found[BASELINE]["bases_bytes"] = sum(t.nbytes for t in made.drawn(spec.kind))
            stopped = result.interrupted
            if memory and not stopped:
                stopped = questions.add_peaks(found, done, functools.partial(layers.peak_bytes, spec))
            print(memory_table(found))
            return found, stopped

        return Setup(
            {name: functools.partial(made.provider, name) for name in names},
            baseline=BASELINE if BASELINE in names else names[0],
            check=lambda result: None,  # every provider has its own
            dtype=getattr(torch, spec.dtype),
            work=lambda: {name: made.work(name) for name in names},
            extra=None if times_only else extra,
        )

    return Case(spec.title(question), spec.columns, set_up)


def memory_table(found: Columns) -> str:
    lines = []
    for name, row in found.items():
        sizes = {"kept": "saved_bytes", "peak": "peak_bytes", "bases": "bases_bytes"}
        said = [f"{word} {row[column] / 2**20:.2f} MiB" for word, column in sizes.items() if column in row]
        lines.append(f"  {name:{max(map(len, found))}}  {', '.join(said)}")
    return "\n".join(lines)


def methods_of(spec: Spec, options: argparse.Namespace) -> list[str]:
    usual = [name for name in layers.names(spec) if not options.quick or "compiled" not in name]
    return model.chosen(options.methods, layers.known(), usual, ";", "method")


def default_cases(options: argparse.Namespace) -> Sequence[Spec]:
    if options.quick:
        return QUICK_CASES if multiplies_bfloat16(options.device) else QUICK_CASES[:1]
    if torch.device(options.device).type == "cuda":
        return CUDA_CASES
    return CASES if multiplies_bfloat16(options.device) else CASES[:-1]  # one of them, for what it takes in memory


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("linear", __doc__, argv, add=add_options)
    if options.grid:
        over = {AXES[option][0]: chosen for option, chosen in GRID.items()}
        wanted = [
            case("grid", spec, ["randlora", *(name for name in FORCED if name in layers.names(spec))], options, True)
            for spec in specs(options, (), over)
        ]
    else:
        chosen = specs(options, default_cases(options))
        wanted = [case("linear", spec, methods_of(spec, options), options) for spec in chosen]
    questions.answer(
        records.Book("linear-grid" if options.grid else "linear", layers.COLUMNS, options), wanted, options
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
