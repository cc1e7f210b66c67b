"""Ternary bases: what do sparse and very sparse ones cost, in time, memory and bytes kept?

Forward and backward of a d -> d layer on T tokens, r = 32, fp32, for every kind of bases; with --density for one layer
over the density of its bases, from dense to 1/64, which also draws docs/density.png.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: python bench/kinds.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from bench import ROOT, linear, measure, plots, records
from bench.measure import Provider

RANK = linear.RANK
CASES = ((1024, 1024), (1024, 4096), (2048, 512), (384, 8192))
KINDS = ("sparse", "very_sparse")
SPARSITIES = (None, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0, 64.0)  # of --density; None: dense
BASELINE = "PEFT RandLoRA"


class Case(linear.Case):
    """A layer's case with bases of some kind."""

    def __init__(self, d: int, T: int, bases: dict, device: str) -> None:
        import randlora

        super().__init__(d, T, torch.float32, device)
        self.bases = randlora.RandomBases(d, d, RANK, **bases)
        at = torch.device(device)
        found = self.bases.pattern(d, at)
        self.pattern, scale = found or (None, self.bases.scale)
        self.stored = (None, None) if self.pattern else self.bases.tensors(torch.float32, at)
        self.bytes = self.bases.nbytes
        # Unit variance, as PEFT stores them, and for the reference.
        self.A, self.B = (t * self.bases.scale**0.5 for t in self.bases.draw(torch.float32, at))
        self.B2 = self.B.reshape(d, -1)
        self.scale = scale


def ours(case: Case) -> Provider:
    from randlora.functional import linear as layer

    def function(x: Tensor) -> Tensor:
        return layer(x, case.base.weight, case.base.bias, *case.stored, case.lam, case.gamma,
                     case.scaling * case.scale, pattern=case.pattern)  # fmt: skip

    return case.step(function, [case.lam, case.gamma])


def providers() -> dict[str, Callable[[Case], Provider]]:
    return {
        "randlora": ours,
        BASELINE: functools.partial(linear.peft, config_name="RandLoraConfig"),
        "PEFT LoRA": functools.partial(linear.peft, config_name="LoraConfig"),
        "floor: frozen layer": linear.frozen,
    }


def step_of(d: int, T: int, bases: dict, name: str) -> Callable[[], list[Tensor]]:
    """For the memory of a call, in a process of its own."""
    case = Case(d, T, bases, "cpu")
    provider = providers()[name](case)
    provider.run()
    return provider.run


def build_only(options, book: records.Book) -> None:
    """The update's matrix alone, d = 2048: from lists, from bits, and the dense product of the same size."""
    d = 2048
    cases = {kind: Case(d, 1, {"kind": kind}, options.device) for kind in ("dense", *KINDS)}

    def make(kind: str) -> Provider:
        case = cases[kind]
        gamma, lam = case.gamma.detach(), case.lam.detach()
        if case.pattern is None:
            S2 = linear.scaled_base(case, case.x, lam, gamma)
            return Provider(lambda: [case.B2 @ S2])
        op = torch.ops.randlora.sparse_update
        return Provider(lambda: [op(case.pattern, lam, gamma, d, case.scale, None, torch.float32)])

    result = measure.compare(
        f"build dW, d = {d}", {kind: functools.partial(make, kind) for kind in cases}, baseline="dense",
        check=lambda result: 0.0, options=options,
    )  # fmt: skip
    print(f"build dW, d = {d}, r = {RANK}\n" + measure.table(result))
    book.add({"d": d, "T": 0, "r": RANK, "kind": "build only"}, result, {})


def kinds(options) -> Path:
    book = records.Book("kinds", ("d", "T", "r", "kind"), options)
    if not options.only:
        build_only(options, book)
    for d, T in CASES:
        for kind in ("dense", *KINDS):
            title = f"{kind} d={d} T={T}"
            if options.only and options.only not in title:
                continue
            print(f"{title}, r = {RANK}")
            case = Case(d, T, {"kind": kind}, options.device)
            made = {name: functools.partial(make, case) for name, make in providers().items()}
            result = measure.compare(title, made, baseline=BASELINE, check=case.check, options=options)
            print(measure.table(result))
            extra = {"randlora": {"bases_bytes": case.bytes}, BASELINE: {"bases_bytes": case.A.nbytes + case.B.nbytes}}
            if options.device == "cpu" and not options.quick:
                for name in ("randlora", BASELINE, "PEFT LoRA"):
                    peak = measure.peak_above_result(step_of, (d, T, {"kind": kind}, name), (64, 8, {}, name))
                    extra.setdefault(name, {})["peak_bytes"] = peak
                    print(f"  {name}: peak {peak / 2**20:.1f} MiB")
            print(f"  bases: {case.bytes / 2**20:.2f} MiB, PEFT {extra[BASELINE]['bases_bytes'] / 2**20:.2f} MiB")
            book.add({"d": d, "T": T, "r": RANK, "kind": kind}, result, extra)
            if result.interrupted:
                return book.path
    return book.path


def density(options) -> Path:
    book = records.Book("density", ("d", "T", "r", "sparsity"), options)
    d = T = 1024
    cases = {}
    for z in SPARSITIES:
        bases = {} if z is None else {"kind": "sign"} if z == 1 else {"kind": "sparse", "sparsity": z}
        cases["dense" if z is None else f"z = {z:g}"] = Case(d, T, bases, options.device)
    result = measure.compare(
        f"density d={d} T={T}",
        {name: functools.partial(ours, case) for name, case in cases.items()}
        | {"PEFT LoRA": functools.partial(linear.peft, cases["dense"], "LoraConfig"),
           BASELINE: functools.partial(linear.peft, cases["dense"], "RandLoraConfig")},
        baseline=BASELINE,
        check=lambda result: None,
        options=options,
    )  # fmt: skip
    print(measure.table(result))
    extra = {name: {"bases_bytes": case.bytes} for name, case in cases.items()}
    book.add({"d": d, "T": T, "r": RANK, "sparsity": "sweep"}, result, extra)
    picture = draw_density(book.path, ROOT / "docs" / "density.png")
    print(f"drew {picture}")
    return book.path


def draw_density(csv: Path, path: Path) -> Path:
    """Time and bytes over density, from the CSV."""
    from matplotlib import pyplot as plt

    rows = {row["provider"]: row for row in records.read(csv) if row["median_ms"]}
    points = sorted((1 / float(name[4:]), row) for name, row in rows.items() if name.startswith("z = "))
    densities = [x for x, _ in points]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    color = plots.COLORS["randlora"]
    time.plot(densities, [float(r["median_ms"]) for _, r in points], "o-", color=color, label="randlora, ternary")
    for name, style in (("dense", "-"), (BASELINE, "--"), ("PEFT LoRA", ":")):
        if name in rows:
            label = "randlora, dense" if name == "dense" else name
            shade = color if name == "dense" else "#404040"
            time.axhline(float(rows[name]["median_ms"]), linestyle=style, color=shade, alpha=0.6, label=label)
    time.set(ylabel="ms per training step of a layer", ylim=(0, None), title="time")
    memory.plot(densities, [float(r["bases_bytes"]) / 2**20 for _, r in points], "o-", color=color)
    memory.axhline(float(rows["dense"]["bases_bytes"]) / 2**20, color=color, alpha=0.6)
    memory.set(ylabel="MiB of bases (line: dense, fp32)", yscale="log", title="memory")
    for axis in (time, memory):
        axis.set_xscale("log", base=2)
        axis.set_xticks([2.0**-e for e in range(7)], ["1", *(f"1/{2**e}" for e in range(1, 7))])
        axis.set_xlabel("density of A and B")
        axis.grid(alpha=0.3)
    time.legend()
    row = points[0][1]
    machine = f"{row['gpu'] or row['cpu']}, {row['threads']} threads"
    figure.suptitle(f"d = {row['d']}, T = {row['T']}, r = {row['r']}, fp32, {machine}")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    sweep = "--density" in argv
    options = measure.parse("kinds", __doc__ + "\nFurther option: --density", [a for a in argv if a != "--density"])
    path = density(options) if sweep else kinds(options)
    if not sweep:
        plots.draw(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
