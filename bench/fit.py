"""What can each kind of bases fit? Targets of three spectra, the update of one layer, the same optimizer.

A random d x d matrix of a given spectrum is what lambda and gamma are to make, by Adam on the squared error, from a
random start. What is told is the part of the target's energy that is left: 1 for nothing fitted, 0 for all of it. Every
column of a RandLoRA update has n free numbers, which alone buy n / d; what is below 1 - n / d comes from lambda, which
chooses directions for all columns at once. LoRA of as many numbers is fitted beside it, and what the best matrix of
its rank leaves is known.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: python bench/fit.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from tqdm import tqdm

import randlora
from bench import measure, records
from randlora.bases.random_bases import KINDS
from randlora.functional import delta_weight, sparse_delta_weight

SPECTRA: dict[str, Callable[[Tensor], Tensor]] = {
    "flat": torch.ones_like,
    "1 / sqrt(i)": lambda i: i**-0.5,
    "1 / i": lambda i: 1 / i,
}
DIM, RANK, STEPS, RATE = 384, 32, 600, 0.05
LORA = "LoRA"


def target(spectrum: str, d: int, seed: int) -> Tensor:
    """``[d, d]`` of this spectrum between random orthogonal matrices, with entries of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(d, d, generator=generator)).Q for _ in range(2))
    made = left * SPECTRA[spectrum](torch.arange(1, d + 1, dtype=torch.float32)) @ right
    return made / made.square().mean().sqrt()


def update_of(kind: str, d: int, r: int, seed: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
    """Parameters to be trained, and what makes a matrix of them."""
    generator = torch.Generator().manual_seed(1000 + seed)
    n = -(-d // r)
    if kind == LORA:
        rank = round(n * (r + d) / (2 * d))
        down, up = (torch.randn(rank, d, generator=generator) * rank**-0.25 for _ in range(2))
        parameters = [down.requires_grad_(), up.requires_grad_()]
        return parameters, lambda: parameters[0].T @ parameters[1]
    bases = randlora.RandomBases(d, d, r, kind, seed=seed)
    lam = torch.randn(r, n, generator=generator).requires_grad_()
    gamma = (torch.randn(n, d, generator=generator) * (n * r) ** -0.5).requires_grad_()
    found = bases.pattern(d)
    if found is None:
        return [lam, gamma], lambda: delta_weight(*bases.tensors(), lam, gamma, 1.0, d, d)
    return [lam, gamma], lambda: sparse_delta_weight(*found, lam, gamma, 1.0, d, d)


def fit(kind: str, wanted: Tensor, r: int, steps: int, seed: int) -> tuple[float, int]:
    """The energy that is left, and how many numbers were trained."""
    parameters, make = update_of(kind, wanted.shape[0], r, seed)
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    scale = wanted.square().sum()
    for _ in range(steps):
        optimizer.zero_grad()
        left = (make() - wanted).square().sum() / scale
        left.backward()
        optimizer.step()
        rate.step()
    with torch.no_grad():
        left = (make() - wanted).square().sum() / scale
    return left.item(), sum(p.numel() for p in parameters)


def lowest(wanted: Tensor, rank: int) -> float:
    """What the best matrix of this rank leaves."""
    energies = torch.linalg.svdvals(wanted).square()
    return (energies[rank:].sum() / energies.sum()).item()


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dim", type=int, default=DIM, help="size of the target (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=RANK, help="of one base (default: %(default)s)")
    parser.add_argument("--steps", type=int, help=f"of Adam (default: {STEPS}; with --quick: {STEPS // 10})")
    parser.add_argument("--seeds", type=int, help="targets and starts (default: 3; with --quick: 1)")


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("fit", __doc__, argv, add=add_options)
    steps = options.steps or (STEPS // 10 if options.quick else STEPS)
    seeds = options.seeds or (1 if options.quick else 3)
    book = records.Book("fit", ("spectrum", "d", "r", "seed"), options)
    for seed in range(seeds):
        for spectrum in SPECTRA:
            if options.only and options.only not in f"fit {spectrum}":
                continue
            wanted, rows = target(spectrum, options.dim, seed), {}
            for kind in tqdm((*KINDS, LORA), desc=f"{spectrum}, seed {seed}", leave=False, disable=None):
                start = time.perf_counter()
                left, numbers = fit(kind, wanted, options.rank, steps, seed)
                rows[kind] = {
                    "energy_left": f"{left:.4f}", "numbers": numbers, "steps": steps,
                    "seconds": f"{time.perf_counter() - start:.1f}",
                }  # fmt: skip
            rows[LORA]["lowest"] = f"{lowest(wanted, rows[LORA]['numbers'] // (2 * options.dim)):.4f}"
            for name in rows:
                rows[name].setdefault("lowest", "")
            book.put({"spectrum": spectrum, "d": options.dim, "r": options.rank, "seed": seed}, rows)
            told = ", ".join(f"{name} {row['energy_left']}" for name, row in rows.items())
            print(f"{spectrum}, seed {seed}: {told}", flush=True)
    if not options.no_picture:
        from bench import plots

        plots.draw(book.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
