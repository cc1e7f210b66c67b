"""Kinds of bases: what do Hadamard, sparse and very sparse ones cost, in time, memory and bytes kept?

Forward and backward of a d -> d layer on T tokens, r = 32, fp32, for every kind of bases; the axes are `linear`'s
options. With --density for one layer over the density of its bases, from dense to 1/64, which also draws a picture.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from pathlib import Path

if not __package__:  # run as a file: python bench/kinds.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import ROOT, layer, linear, measure, model, plain, plots, questions, records
from bench.floors import Work
from bench.layer import Layer, Spec
from bench.measure import Provider
from bench.questions import Case, Setup

KINDS = ("dense", *layer.KINDS)
CASES = tuple(
    Spec(d, T, kind=kind) for d, T in ((1024, 1024), (1024, 4096), (2048, 512), (384, 8192)) for kind in KINDS
)
QUICK_CASES = tuple(Spec(1024, 1024, kind=kind) for kind in KINDS)
METHODS = ("randlora", linear.BASELINE, "PEFT LoRA", "frozen")
SPARSITIES = (None, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)  # of --density; None: dense
BUILD_DIM = 2048


def build_only(options: argparse.Namespace) -> Case:
    """The update's matrix alone: by transforms, from lists, from bits, and the dense product of the same size."""
    spec = Spec(BUILD_DIM, 1, device=options.device)

    def make(kind: str, made: Layer) -> Provider:
        found = made.make_bases(kind).pattern(spec.d, torch.device(spec.device))
        if found is None:
            A, B = made.drawn("dense")
            S2 = plain.scaled_base(A, made.lam, made.gamma, made.scaling, torch.float32)
            B2 = B.flatten(1)
            return Provider(lambda: [B2 @ S2])
        pattern, scale = found
        op = torch.ops.randlora.hadamard_update if kind == "hadamard" else torch.ops.randlora.sparse_update
        return Provider(lambda: [op(pattern, made.lam, made.gamma, spec.d, scale, None, torch.float32)])

    def set_up() -> Setup:
        made = Layer(spec)
        written = Work(0, 4 * spec.d**2)
        return Setup(
            {kind: functools.partial(make, kind, made) for kind in KINDS},
            baseline="dense",
            check=lambda result: None,  # tests/ops/test_ternary.py and tests/ops/test_hadamard.py compare them
            work={"dense": written + Work(spec.d**3)} | dict.fromkeys(layer.KINDS, written),
        )

    return Case(f"kinds build dW d={spec.d}", spec.columns | {"kind": "all", "pass": "build dW"}, set_up)


def density(options: argparse.Namespace) -> None:
    book = records.Book("density", ("d", "T", "r", "sparsity"), options)
    plain_spec = Spec(device=options.device)

    def set_up() -> Setup:
        made: dict[str, Layer] = {}
        for z in SPARSITIES:
            kind = "dense" if z is None else "sign" if z == 1 else "sparse"
            sparsity = z if kind == "sparse" else None
            spec = Spec(kind=kind, sparsity=sparsity, device=options.device)
            made["dense" if z is None else f"z = {z:g}"] = Layer(spec)
        factories = {name: functools.partial(case.provider, "randlora") for name, case in made.items()}
        others = ("PEFT LoRA", linear.BASELINE)
        factories |= {name: functools.partial(made["dense"].provider, name) for name in others}
        return Setup(
            factories,
            baseline=linear.BASELINE,
            check=lambda result: None,  # every provider has its own
            work=lambda: {name: made.get(name, made["dense"]).work("randlora" if name in made else name)
                          for name in factories},
            extra=lambda result: (
                {name: {"bases_bytes": case.bases_bytes} for name, case in made.items()}, result.interrupted),
        )  # fmt: skip

    columns = {"d": plain_spec.d, "T": plain_spec.T, "r": plain_spec.r, "sparsity": "sweep"}
    go_on = questions.answer(book, [Case(f"density d={plain_spec.d} T={plain_spec.T}", columns, set_up)], options)
    if go_on and not options.quick and options.results == records.RESULTS:  # what docs/kinds.md shows
        shutil.copyfile(plots.draw(book.path)[-1], ROOT / "docs" / "density.png")


def add_options(parser: argparse.ArgumentParser) -> None:
    linear.add_axes(parser)
    parser.add_argument("--density", action="store_true", help="over the density of the bases")


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("kinds", __doc__, argv, add=add_options)
    if options.density:
        density(options)
        return 0
    specs = linear.specs(options, QUICK_CASES if options.quick else CASES)
    names = model.chosen(options.methods, layer.known(), METHODS, ";", "method")
    cases = [linear.case("kinds", spec, names, options) for spec in specs]
    book = records.Book("kinds", layer.COLUMNS, options)
    questions.answer(book, [build_only(options), *cases], options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
