"""A mixture's experts: what do forward and backward of one module of fused experts cost under every method?

Experts of the sizes of known models on random tokens, evenly routed; r = 32 of LoRA and of one base; gradients for the
tokens and the adapter. "frozen" is the module as transformers runs it (``grouped_mm``). PEFT's LoRA adds its update to
the weights of all experts. "PyTorch" is the best that we could write without compiled code: the scaled bases of all
experts as one tensor, and ``grouped_mm``.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: python bench/experts.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from bench import measure, methods, peak, plain_experts, questions, records
from bench.floors import Work
from bench.measure import Comparison, Provider
from bench.methods import FROZEN
from bench.questions import Case, Columns, Setup
from bench.shapes import multiplies_bfloat16
from bench.training import saved_bytes

PARAMETERS = ("gate_up_proj", "down_proj")
BASELINE = "PEFT LoRA"
RANK = 32


@dataclass(frozen=True)
class Spec:
    """`inner`: between the two products, of each half of the first one's result."""

    model: str
    experts: int
    hidden: int
    inner: int
    top_k: int
    tokens: int
    dtype: str
    device: str = "cpu"
    r: int = RANK

    @property
    def columns(self) -> dict[str, str | int]:
        found = dataclasses.asdict(self)
        del found["device"]
        return found

    @property
    def title(self) -> str:
        return (
            f"experts {self.model}: {self.experts} of {self.hidden} -> 2 x {self.inner} -> {self.hidden}, "
            f"{self.top_k} of them for each of {self.tokens} tokens, {self.dtype} r={self.r}"
        )


# A quarter of the width or less of the models that they are called after.
CPU = (
    Spec("Mixtral", 8, 1024, 1792, 2, 1024, "float32"),
    Spec("Qwen3-MoE", 64, 512, 192, 8, 1024, "float32"),
    Spec("Qwen3-MoE", 64, 512, 192, 8, 1024, "bfloat16"),
)
CUDA = (
    Spec("Qwen3-30B-A3B", 128, 2048, 768, 8, 4096, "bfloat16"),
    Spec("Mixtral-8x7B", 8, 4096, 14336, 2, 4096, "bfloat16"),
)
TINY = (Spec("tiny", 4, 64, 32, 2, 16, "float32"),)


class Experts:
    """The tensors that all methods of one case share."""

    def __init__(self, spec: Spec) -> None:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        torch.manual_seed(0)
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        like = {"dtype": self.dtype, "device": spec.device}
        config = MixtralConfig(
            hidden_size=spec.hidden, intermediate_size=spec.inner, num_local_experts=spec.experts,
            num_experts_per_tok=spec.top_k,
        )  # fmt: skip
        config._experts_implementation = "grouped_mm"
        with torch.device(spec.device):
            experts = MixtralExperts(config).to(self.dtype).requires_grad_(False)
        for p in experts.parameters():
            p.normal_(0, p.shape[-1] ** -0.5)
        self.net = nn.Sequential(OrderedDict(experts=experts))
        self.x = torch.randn(spec.tokens, spec.hidden, **like, requires_grad=True)
        scores = torch.rand(spec.tokens, spec.experts, device=spec.device)
        weights, self.ids = scores.topk(spec.top_k)
        self.weights = (weights / weights.sum(1, keepdim=True)).to(self.dtype)
        self.grad = torch.randn(spec.tokens, spec.hidden, **like)
        self.saved: dict[str, int] = {}
        self._expected: dict[str, list[Tensor]] = {}

    def make(self, name: str) -> nn.Module:
        """The adapted module, with random lambda and gamma. Its call is that of transformers' experts."""
        model = methods.twin(self.net)
        adapted = METHODS[name](model, self.spec)
        for lam, gamma in pairs(adapted):
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                lam.copy_(torch.randn(lam.shape, generator=generator))
                gamma.copy_(torch.randn(gamma.shape, generator=generator) / gamma.shape[-1])
        return adapted

    def provider(self, name: str) -> Provider:
        adapted = self.make(name)
        module = methods.inner(adapted).experts
        arguments = self.x, self.ids, self.weights
        self.saved[name], _ = saved_bytes(adapted, lambda: module(*arguments))
        wanted = [self.x, *(p for p in adapted.parameters() if p.requires_grad)]

        def run() -> list[Tensor]:
            y = module(*arguments)
            return [y, *torch.autograd.grad(y, wanted, self.grad)]

        return Provider(run, check=functools.partial(self.check, name, module))

    def check(self, name: str, module: nn.Module, result: list[Tensor]) -> float:
        """Of the output and of dx, against the frozen experts with the update in their weights, in float64."""
        kind = kind_of(name)
        if kind not in self._expected:
            self._expected[kind] = self._by_hand(module if kind else self.net.experts)
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(result, self._expected[kind], strict=False)]
        allowed = 1e-4 if self.dtype == torch.float32 else 0.05
        assert max(errors) < allowed, f"relative errors {[f'{error:.1e}' for error in errors]}"
        return max(errors)

    def _by_hand(self, module: nn.Module) -> list[Tensor]:
        base = self.net.experts
        updates = plain_experts.updates(module) if module is not base else {}
        x, y = self.x.detach().double().requires_grad_(), 0
        for expert in range(self.spec.experts):
            token, place = (self.ids == expert).nonzero(as_tuple=True)
            up, down = (
                getattr(base, name)[expert].double() + (updates[name](expert) if updates else 0) for name in PARAMETERS
            )
            gate, value = (x[token] @ up.T).chunk(2, dim=-1)
            of_expert = (base.act_fn(gate) * value) @ down.T * self.weights[token, place].double().unsqueeze(1)
            y = y + torch.zeros_like(x).index_add(0, token, of_expert)
        return [y.detach(), *torch.autograd.grad(y, [x], self.grad.double())]

    def work(self, name: str) -> Work:
        """Of the frozen products, forward and backward, whose weights are read in both: nothing can do without."""
        spec = self.spec
        rows, weights = spec.tokens * spec.top_k, 3 * spec.hidden * spec.inner
        moved = rows * (2 * spec.hidden + 3 * spec.inner) + spec.experts * weights
        return Work(2 * rows * weights, 2 * moved * self.dtype.itemsize)


# ---- methods ----


def frozen(model: nn.Module, spec: Spec) -> nn.Module:
    return model


def lora(model: nn.Module, spec: Spec, fp32_adapter: bool = True) -> nn.Module:
    import peft

    config = peft.LoraConfig(
        r=spec.r, lora_alpha=2 * spec.r, target_modules=[], target_parameters=[f"experts.{p}" for p in PARAMETERS]
    )
    return peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapter)


def own(model: nn.Module, spec: Spec, kind: str = "dense") -> nn.Module:
    import randlora

    config = randlora.RandLoraConfig(
        r=spec.r, randlora_alpha=2 * spec.r, kind=kind, target_modules=[],
        target_parameters=[f"experts.{p}" for p in PARAMETERS],
    )  # fmt: skip
    return randlora.get_peft_model(model, config)


def plain(model: nn.Module, spec: Spec, compiled: bool = False) -> nn.Module:
    model.experts = plain_experts.Experts(model.experts, spec.r, 2.0, compiled)
    return model


METHODS: dict[str, Callable[[nn.Module, Spec], nn.Module]] = {
    FROZEN: frozen,
    "PEFT LoRA": lora,
    "PEFT LoRA, 16-bit": functools.partial(lora, fp32_adapter=False),
    "PyTorch": plain,
    "PyTorch, compiled": functools.partial(plain, compiled=True),
    "randlora": own,
    "randlora hadamard": functools.partial(own, kind="hadamard"),
}


def kind_of(name: str) -> str:
    """Of the bases that a method computes with; "" for none."""
    if name.startswith("randlora "):
        return name.removeprefix("randlora ")
    return "dense" if name.startswith(("randlora", "PyTorch")) else ""


def names(spec: Spec, quick: bool) -> list[str]:
    """All in bfloat16, which is the only dtype in which torch.compile takes grouped_mm."""
    found = list(METHODS)
    if spec.dtype != "bfloat16":
        found = [name for name in found if not name.endswith("16-bit")]
    if spec.dtype != "bfloat16" or quick:
        found = [name for name in found if "compiled" not in name]
    return found


def pairs(adapted: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """lambda and gamma of each parameter."""
    found = []
    for module in methods.inner(adapted).modules():
        lam, gamma = (getattr(module, f"randlora_{which}", None) for which in ("lambda", "gamma"))
        if isinstance(lam, nn.Parameter):
            found.append((lam, gamma))
        elif isinstance(lam, nn.ParameterDict):
            found.append((lam["default"], gamma["default"]))
    return found


# ---- the question ----


def case(spec: Spec, options: argparse.Namespace) -> Case:
    def set_up() -> Setup:
        torch.compiler.reset()
        made, chosen = Experts(spec), names(spec, options.quick)

        def extra(result: Comparison) -> tuple[Columns, bool]:
            done = [name for name, timing in result.timings.items() if timing.samples]
            found: Columns = {name: {"saved_bytes": made.saved[name]} for name in done}
            stopped = result.interrupted
            if not options.quick and not stopped:
                stopped = questions.add_peaks(found, done, functools.partial(peak_bytes, spec))
            return found, stopped

        return Setup(
            {name: functools.partial(made.provider, name) for name in chosen},
            baseline=BASELINE,
            check=lambda result: None,  # every provider has its own
            dtype=made.dtype,
            work=lambda: {name: made.work(name) for name in chosen},
            extra=extra,
        )

    return Case(spec.title, spec.columns, set_up)


def peak_bytes(spec: Spec, name: str) -> int:
    """Of a forward and backward, above what exists before and what it returns."""
    small = dataclasses.replace(TINY[0], dtype=spec.dtype, device=spec.device)
    return peak.above_result(step_of, (spec, name), (small, name), spec.device)


def step_of(spec: Spec, name: str) -> Callable[[], list[Tensor]]:
    return Experts(spec).provider(name).run


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tiny", action="store_true", help="experts that take no time, to try the command")


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("experts", __doc__, argv, add=add_options)
    cuda = torch.device(options.device).type == "cuda"
    specs = TINY if options.tiny else CUDA if cuda else CPU
    if not multiplies_bfloat16(options.device):
        specs = tuple(spec for spec in specs if spec.dtype != "bfloat16")
    book = records.Book("experts", tuple(CPU[0].columns), options)
    questions.answer(book, [case(dataclasses.replace(s, device=options.device), options) for s in specs], options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
