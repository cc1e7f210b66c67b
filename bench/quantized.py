"""One adapted layer whose frozen weight is quantised: what do adapters cost on NF4, int8 and int4?

A d -> d layer under two kinds of calls: a training step on many tokens (forward, and gradients for the input and the
adapter), and a forward of one token under no_grad in eval mode, as in decoding. Beside it the same layer as it was
before it was quantised ("none"). NF4 is bitsandbytes', int8 and both forms of int4 are torchao's. Results are checked
in float64 against the update and the numbers that the quantised weight stands for. A kind of quantisation whose package
is missing, or which the device does not know, is a row that says so.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: python bench/quantized.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from bench import layer, linear, measure, methods, model, peak, questions, records
from bench.layer import BOTH, Layer, Spec
from bench.measure import Comparison, Provider
from bench.methods import FROZEN
from bench.questions import Case, Columns, Setup
from bench.shapes import multiplies_bfloat16

STEP, ONE_TOKEN = BOTH, "forward"
BASELINE = "PEFT LoRA"
NAMES = (
    FROZEN, BASELINE, "PEFT LoRA, 16-bit", "PEFT RandLoRA", "PEFT RandLoRA, 16-bit", "randlora", "randlora hadamard",
)  # fmt: skip
COLUMNS = ("base", *layer.COLUMNS)
GROUP = 128  # weights that share a scale, of torchao's int4
SIZES = {"cpu": (1024, 256), "cuda": (4096, 1024)}  # of the layer, and tokens of a step


# ---- kinds of quantisation: from a layer to a new one that is quantised; the layer stays as it is ----


def unquantized(plain: nn.Linear) -> nn.Module:
    return copy.deepcopy(plain)


def nf4(plain: nn.Linear) -> nn.Module:
    """As QLoRA has it, with scales that are quantised, too."""
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        plain.in_features, plain.out_features, compute_dtype=plain.weight.dtype, quant_type="nf4"
    )
    made.to(plain.weight.dtype).load_state_dict(plain.state_dict())
    return made.to(plain.weight.device)  # this quantises


def of_torchao(plain: nn.Linear, config: str, **settings: Any) -> nn.Module:
    from torchao import quantization

    made = copy.deepcopy(plain)
    quantization.quantize_(made, getattr(quantization, config)(**settings))
    return made


def int8(plain: nn.Linear) -> nn.Module:
    # The default of this setting allows TF32 in all of the process.
    return of_torchao(plain, "Int8WeightOnlyConfig", set_inductor_config=False)


def int4(plain: nn.Linear) -> nn.Module:
    """On any device: the weight is made a matrix of numbers for every product."""
    from torchao.quantization import PerGroup

    return of_torchao(plain, "IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(GROUP))


def int4_packed(plain: nn.Linear) -> nn.Module:
    """For GPUs and bf16: PyTorch's own product with int4, which reads nothing else of the weight."""
    return of_torchao(
        plain, "Int4WeightOnlyConfig", group_size=GROUP, int4_packing_format="tile_packed_to_4d",
        set_inductor_config=False,
    )  # fmt: skip


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "none": unquantized,
    "nf4": nf4,
    "int8": int8,
    "int4": int4,
    "int4 packed": int4_packed,
}


# ---- a layer ----


class Quantized(Layer):
    """Every method gets a quantised layer of its own, as some keep things beside their weight."""

    def __init__(self, base: str, spec: Spec) -> None:
        super().__init__(spec)
        self.base, self.plain = base, self.net.layer
        if base == "nf4":
            self.allowed = 0.05  # on a CPU its own forward in eval mode rounds the weight's scales to bf16
        # What results are checked against: a layer with the numbers that the quantised one stands for.
        numbers = numbers_of(self.quantize())
        self.net.layer = nn.Linear(spec.d, spec.d, device=spec.device).requires_grad_(False)
        with torch.no_grad():
            self.net.layer.weight.copy_(numbers)
            self.net.layer.bias.copy_(self.plain.bias)

    def quantize(self) -> nn.Module:
        return KINDS[self.base](self.plain).requires_grad_(False)

    def without_adapter(self, name: str) -> nn.Module:
        net = nn.Sequential(OrderedDict(layer=self.quantize()))
        net.is_loaded_in_4bit = self.base == "nf4"  # type: ignore[assignment]  # PEFT asks for it
        return net

    def provider(self, name: str) -> Provider:
        if self.spec.which == STEP:
            return super().provider(name)
        adapted = self.make(name).eval()
        x = self.x.detach()  # bitsandbytes' product of one token is for inputs without a gradient

        @torch.no_grad()
        def run() -> list[Tensor]:
            return [adapted(x)]

        return Provider(run, check=functools.partial(self.check, self.kind_of(name)))


def numbers_of(linear: Any) -> Tensor:
    from randlora.layers import quantized

    return quantized.dequantize(linear) if quantized.is_quantized(linear) else linear.weight


def peak_bytes(base: str, spec: Spec, name: str) -> int:
    """Of a step, above what exists before and what it returns."""
    small = dataclasses.replace(spec, d=max(GROUP, 2 * spec.r), T=8)
    return peak.above_result(step_of, (base, spec, name), (base, small, name), spec.device)


def step_of(base: str, spec: Spec, name: str) -> Callable[[], list[Tensor]]:
    return Quantized(base, spec).provider(name).run


# ---- the question ----


def names_of(spec: Spec) -> list[str]:
    known = methods.suitable(getattr(torch, spec.dtype))
    return [name for name in NAMES if name in known]


def case(base: str, spec: Spec, options: argparse.Namespace) -> Case:
    names = model.chosen(options.methods, layer.known(), names_of(spec), ";", "method")

    def set_up() -> Setup:
        made = Quantized(base, spec)

        def extra(result: Comparison) -> tuple[Columns, bool]:
            done = [name for name, timing in result.timings.items() if timing.samples]
            found: Columns = {name: {"saved_bytes": made.saved[name]} for name in done if name in made.saved}
            stopped = result.interrupted
            if spec.which == STEP and not (options.quick or options.no_memory or stopped):
                stopped = questions.add_peaks(found, done, functools.partial(peak_bytes, base, spec))
            print(linear.memory_table(found))
            return found, stopped

        return Setup(
            {name: functools.partial(made.provider, name) for name in names},
            baseline=BASELINE if BASELINE in names else names[0],
            check=lambda result: None,  # every provider has its own
            dtype=made.dtype,
            extra=extra,
        )

    return Case(f"{spec.title('quantized')}, {base}", {"base": base} | spec.columns, set_up)


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--d", type=int, help="size of the layer (default: 4096 on a GPU, 1024 on a CPU)")
    add("--tokens", type=int, help="of a training step (default: 1024 on a GPU, 256 on a CPU)")
    add("--kinds", metavar="NAME,...", help=f"of {', '.join(KINDS)} (default: all that are for the device)")
    add("--methods", metavar="NAME;...", help=f"default: {'; '.join(NAMES)}")
    add("--no-memory", action="store_true", help="leave the peak memory out, as --quick does")


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("quantized", __doc__, argv, add=add_options)
    at = torch.device(options.device).type
    usual_d, usual_tokens = SIZES.get(at, SIZES["cpu"])
    d = usual_d if options.d is None else options.d
    tokens = usual_tokens if options.tokens is None else options.tokens
    if min(d, tokens) < 1:
        raise SystemExit(f"--d and --tokens must be at least 1, got {d} and {tokens}")
    dtype = "bfloat16" if multiplies_bfloat16(options.device) else "float32"
    usual = [name for name in KINDS if at == "cuda" or name != "int4 packed"]
    cases = [
        case(base, Spec(d, T, dtype=dtype, which=which, device=options.device), options)
        for base in model.chosen(options.kinds, KINDS, usual, ",", "kind of quantisation")
        for which, T in ((STEP, tokens), (ONE_TOKEN, 1))
    ]
    questions.answer(records.Book("quantized", COLUMNS, options), cases, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
