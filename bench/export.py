"""An adapter as LoRA: PEFT's ``save_as_lora`` against ``randlora.export.to_lora``; and the tensors of merged weights.

A d -> d layer whose lambda and gamma are random: of all adapters the one that approximates worst, with a spectrum that
falls slowest. PEFT takes the SVD of the whole update; here it is the block Krylov method of
``randlora/export/low_rank.py``, and no SVD at all where num_bases * r is the rank asked for. Singular values are
checked. Then what a server gets at every step of RL, the weight with the adapter in it: ``merged_tensors`` against
PEFT, which merges, hands out, and unmerges.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python bench/export.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import randlora
from bench import measure, model, questions, records
from bench.measure import Provider

DIM, BASE_RANK, RANK = 4096, 32, 64
BASELINE, MERGED_BASELINE = "PEFT save_as_lora", "PEFT merge and unmerge"
TOLERANCE = 1e-5  # of a singular value, relative


class Case:
    """One layer, and the folders that its adapter is written into."""

    def __init__(self, d: int, r: int, rank: int, device: str) -> None:
        self.d, self.r, self.rank, self.device = d, r, rank, device
        self.base = nn.Sequential(nn.Linear(d, d, bias=False, device=device))
        self.folder = tempfile.TemporaryDirectory()
        self.written = 0

    def new_folder(self) -> Path:
        self.written += 1
        return Path(self.folder.name) / str(self.written)

    def of_peft(self) -> Provider:
        config = peft.RandLoraConfig(r=self.r, target_modules=["0"])
        model = randomize(peft.get_peft_model(nn.Sequential(self.base[0]), config))
        layer = model.base_model.model[0]
        return self.provider(
            lambda folder: peft.save_as_lora(folder, model, rank=self.rank), layer.get_delta_weight("default")
        )

    def of_randlora(self, **settings: Any) -> Provider:
        config = randlora.RandLoraConfig(r=self.r, target_modules=["0"], **settings)
        model = randomize(randlora.get_peft_model(nn.Sequential(self.base[0]), config))
        layer: Any = model.model[0]
        return self.provider(
            lambda folder: randlora.export.to_lora(model, folder, self.rank), layer.get_delta_weight("default")
        )

    def provider(self, write: Callable[[Path], Any], update: Tensor) -> Provider:
        expected = singular_values(update)[: self.rank]
        del update

        def run(folder: Path) -> Path:
            write(folder)
            return folder

        return Provider(run, prepare=self.new_folder, check=functools.partial(self.check, expected))

    def check(self, expected: Tensor, folder: Path) -> float:
        tensors = load_file(folder / "adapter_model.safetensors")
        A, B = (tensors[f"base_model.model.0.lora_{which}.weight"].double() for which in "AB")
        # Those of the product, from the R of two QR decompositions.
        core = torch.linalg.qr(B, mode="r").R @ torch.linalg.qr(A.T, mode="r").R.T
        found = torch.linalg.svdvals(core)[: len(expected)]
        # Of itself, but of the largest for those that are next to nothing beside it.
        error = ((found - expected).abs() / expected.clamp_min(1e-3 * expected[0])).max().item()
        assert error < TOLERANCE, f"singular values differ by {error:.1e} of themselves"
        return error


def singular_values(update: Tensor) -> Tensor:
    """All of them, in float64, from the Gram matrix: those that count are far from its rounding. On the CPU."""
    D = update.detach().double()  # where it is: a GPU decomposes 4096 x 4096 in seconds, a CPU in a minute
    return torch.linalg.eigvalsh(D.T @ D).flip(0).clamp_min(0).sqrt().cpu()


def randomize(model: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name or "randlora_gamma" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def providers(case: Case) -> dict[str, Callable[[], Provider]]:
    few = max(1, case.rank // case.r)
    found = {
        BASELINE: case.of_peft,
        # PEFT's bases, lambda and gamma: the same update.
        "randlora to_lora, dense": functools.partial(case.of_randlora, prng="peft"),
        "randlora to_lora, hadamard": functools.partial(case.of_randlora, kind="hadamard"),
        f"randlora to_lora, hadamard, num_bases={4 * few}": functools.partial(
            case.of_randlora, kind="hadamard", num_bases=4 * few
        ),
    }
    if few * case.r == case.rank:
        found[f"randlora to_lora, hadamard, num_bases={few}, exact"] = functools.partial(
            case.of_randlora, kind="hadamard", num_bases=few
        )
    return found


# ---- merged weights ----


class Merged:
    """One layer in bf16 on a GPU, as servers have it, fp32 elsewhere; each provider has its own."""

    def __init__(self, d: int, r: int, device: str) -> None:
        self.r, self.dtype = r, torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
        self.weight = nn.Linear(d, d, bias=False, device=device).weight.detach().to(self.dtype)
        # Of the update, on average, as large as the weight's.
        self.alpha = self.r * self.weight.float().square().mean().sqrt().item() / d**0.5

    def base(self) -> nn.Module:
        layer = nn.Linear(*self.weight.shape, bias=False, dtype=self.dtype, device=self.weight.device)
        layer.weight.data.copy_(self.weight)
        return nn.Sequential(layer)

    def of_peft(self) -> Provider:
        config = peft.RandLoraConfig(r=self.r, randlora_alpha=self.alpha, target_modules=["0"])
        adapted = randomize(peft.get_peft_model(self.base(), config))
        layer = adapted.base_model.model[0]
        expected = self.weight.double() + layer.get_delta_weight("default").double()

        def run() -> Tensor:
            # The copy stands for what is sent, as unmerging takes the weight back in place.
            adapted.merge_adapter()
            found = layer.base_layer.weight.detach().clone()
            adapted.unmerge_adapter()
            return found

        return Provider(run, check=functools.partial(self.check, expected))

    def of_randlora(self, **settings: Any) -> Provider:
        config = randlora.RandLoraConfig(r=self.r, randlora_alpha=self.alpha, target_modules=["0"], **settings)
        adapted: Any = randomize(randlora.get_peft_model(self.base(), config))
        expected = self.weight.double() + adapted.model[0].get_delta_weight("default").double()

        def run() -> Tensor:
            return dict(adapted.merged_tensors())["0.weight"]

        return Provider(run, check=functools.partial(self.check, expected))

    def check(self, expected: Tensor, weight: Tensor) -> float:
        error = ((weight - expected).norm() / expected.norm()).item()
        assert error < (1e-5 if self.dtype == torch.float32 else 0.01), f"merged weights differ by {error:.1e}"
        return error


def merged_providers(case: Merged) -> dict[str, Callable[[], Provider]]:
    return {
        MERGED_BASELINE: case.of_peft,
        "randlora merged_tensors, dense": functools.partial(case.of_randlora, prng="peft"),
        "randlora merged_tensors, hadamard": functools.partial(case.of_randlora, kind="hadamard"),
    }


# ---- the question ----


class CpuTime:
    """A clock of this process's own seconds, whatever else the machine does meanwhile."""

    def turn(self, provider: Provider, calls: int) -> float:
        total = 0.0
        for _ in range(calls):
            prepared = () if provider.prepare is None else (provider.prepare(),)
            start = time.process_time()
            provider.run(*prepared)
            total += time.process_time() - start
        return total / calls


def setup(
    found: dict[str, Callable[[], Provider]], names: str | None, baseline: str, options: argparse.Namespace
) -> questions.Setup:
    """Of these providers; `names`: as the option has them, separated by semicolons."""
    chosen = model.chosen(names, found, found, ";", "method")
    return questions.Setup(
        {name: found[name] for name in chosen},
        baseline=baseline if baseline in chosen else chosen[0],
        check=lambda result: None,  # every provider has its own
        clock=CpuTime() if options.cpu_time else None,
    )


def case(d: int, rank: int, options: argparse.Namespace) -> questions.Case:
    def set_up() -> questions.Setup:
        torch.manual_seed(0)
        return setup(providers(Case(d, BASE_RANK, rank, options.device)), options.methods, BASELINE, options)

    columns = {"d": d, "r": BASE_RANK, "rank": rank, "time": "cpu" if options.cpu_time else "wall"}
    return questions.Case(f"export to LoRA of rank {rank}, d={d} r={BASE_RANK}", columns, set_up)


def merged_case(d: int, options: argparse.Namespace) -> questions.Case:
    def set_up() -> questions.Setup:
        torch.manual_seed(0)
        made = merged_providers(Merged(d, BASE_RANK, options.device))
        return setup(made, None, MERGED_BASELINE, options)

    columns = {"d": d, "r": BASE_RANK, "time": "cpu" if options.cpu_time else "wall"}
    return questions.Case(f"export of merged tensors, d={d} r={BASE_RANK}", columns, set_up)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dim", type=int, default=DIM, help="size of the layer (default: %(default)s)")
    parser.add_argument("--rank", type=int, default=RANK, help="of LoRA (default: %(default)s)")
    parser.add_argument("--methods", metavar="NAME;...", help="ways to LoRA (default: all); merged tensors have theirs")
    parser.add_argument(
        "--cpu-time", action="store_true",
        help="count the process's own seconds, where others use the machine; with --threads 1, as threads wait busily",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("export", __doc__, argv, add=add_options)
    book = records.Book("export", ("d", "r", "rank", "time"), options)
    if questions.answer(book, [case(options.dim, options.rank, options)], options):
        book = records.Book("export-merged", ("d", "r", "time"), options)
        questions.answer(book, [merged_case(options.dim, options)], options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
