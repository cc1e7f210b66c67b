"""Decoding: how many tokens per second with an adapter that is unmerged, cached or merged?

A turn is a prompt and greedy decoding with a KV cache after it, in whole language models of random weights (on the CPU
with fewer layers and words, as every title says). With --layers instead one token through one d -> d layer at a time.
Lambda and gamma (LoRA: A and B) are random; r = 32.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: python bench/generate.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

from bench import measure, methods, model, one_token, questions, records, reference
from bench.floors import Work
from bench.measure import Comparison, Provider
from bench.questions import Case, Columns, Setup
from bench.shapes import PUBLISHED, SHAPES, Shape, Size

BASELINE = "PEFT LoRA"
KEY = ("model", "depth", "vocab", "batch", "tokens", "dtype", "targets", "r", "new_tokens")
QUICK = ("frozen", BASELINE, "PEFT RandLoRA", "randlora, not cached", "randlora, cached", "randlora, merged")
MODELS = tuple(name for name, shape in SHAPES.items() if shape.causal)
BATCHES = (1, 8)
PROMPT, NEW = 16, 16
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}  # relative error of all logits of a turn


class Decoding:
    """One model, prompt and number of tokens."""

    def __init__(self, shape, size, setting, device: str, new: int) -> None:
        self.shape, self.size, self.setting, self.new = shape, size, setting, new
        self.model = shape.build(size.depth, size.vocab, dtype=size.dtype, device=device).eval()
        self.prompt = shape.inputs(size, device)["input_ids"]
        self.peak: dict[str, int] = {}  # provider -> bytes above the model's weights, on CUDA
        self._reference: tuple[str, nn.Module] | None = None  # of one kind at a time: it is a model in fp32

    def provider(self, name: str) -> Provider:
        method, change = PROVIDERS[name]
        before = allocated(self.prompt.device)
        adapted = methods.adapt(method, self.model, self.setting, own_weights=change is merge).eval()
        if method in methods.FAMILY and method.startswith("PEFT"):
            methods.set_bases(adapted)
        methods.set_random(adapted)
        set_random_lora(adapted)
        kind, without = reference.kind_of(method), allocated(self.prompt.device)
        if self._reference is None or self._reference[0] != kind:
            self._reference = None  # freed before the next one is made
            self._reference = kind, reference.merged(self.model, adapted, kind)[0].eval()
        before += allocated(self.prompt.device) - without  # the reference is no part of the method
        change(adapted)
        decode = one_token.InScope(greedy, 16 << 30) if change is keep_updates else greedy
        if change is keep_updates:  # a layer builds once its calls have cost as much: long prompts are quick at that
            for _ in range(3):
                decode(adapted, self.prompt.repeat(1, -(-self.shape.width // self.prompt.numel())), 1)
        run = functools.partial(decode, adapted, self.prompt, self.new)
        run()
        if self.prompt.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        found = run()
        if self.prompt.is_cuda:
            own = sum(p.nbytes for p in self.model.parameters()) if change is merge else 0
            self.peak[name] = torch.cuda.max_memory_allocated() - before - own
        error = self._check(*found)
        return Provider(lambda: (*run(), error))

    @torch.no_grad()
    def _check(self, tokens: Tensor, logits: Tensor) -> float:
        """All logits at once, for the tokens that were chosen; and each choice is the reference's, or a tie."""
        expected = self._reference[1](tokens, use_cache=False).logits[:, -self.new - 1 : -1]
        error = ((logits.float() - expected).norm() / expected.norm()).item()
        allowed = TOLERANCE[self.size.dtype]
        assert error < allowed, f"relative error of the logits {error:.1e}"
        chosen = expected.gather(2, tokens[:, -self.new :, None])[:, :, 0]
        short = ((expected.amax(2) - chosen) / expected.abs().amax(2)).max().item()
        assert short < allowed, f"a token was chosen whose logit is {short:.1e} below the largest"
        return error


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@torch.no_grad()
def greedy(module: nn.Module, prompt: Tensor, new: int) -> tuple[Tensor, Tensor]:
    """Prompt and new tokens ``[batch, prompt + new]``, and the logits ``[batch, new, words]`` these were chosen by."""
    tokens, logits, cache, step = [prompt], [], None, prompt
    for _ in range(new):
        output = module(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logits.append(output.logits[:, -1])
        step = logits[-1].argmax(-1, keepdim=True)
        tokens.append(step)
    return torch.cat(tokens, 1), torch.stack(logits, 1)


@torch.no_grad()
def set_random_lora(adapted: nn.Module, size: float = 0.5) -> None:
    """An update as large as RandLoRA's here; LoRA's B is zero at first."""
    for i, module in enumerate(m for m in adapted.modules() if hasattr(m, "lora_B")):
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        generator = torch.Generator().manual_seed(i)
        for factor in (A, B):
            factor.copy_(torch.randn(factor.shape, generator=generator))
        update = module.scaling["default"] * B.float() @ A.float()
        weight = module.get_base_layer().weight.float()
        B.mul_(size * weight.square().mean().sqrt() / update.square().mean().sqrt())


# ---- what is done to an adapted model before it decodes ----


def as_it_is(adapted: nn.Module) -> None:
    pass


def merge(adapted: nn.Module) -> None:
    adapted.merge_adapter()


def keep_updates(adapted: nn.Module) -> None:
    """Nothing here: its turns all run inside one scope of ``randlora.inference_cache``."""


# name -> method of bench/methods.py, and what is done to the model then
PROVIDERS: dict[str, tuple[str, Callable[[nn.Module], None]]] = {
    "frozen": (methods.FROZEN, as_it_is),
    BASELINE: ("PEFT LoRA", as_it_is),
    "PEFT LoRA, merged": ("PEFT LoRA", merge),
    "PEFT LoRA, 16-bit": ("PEFT LoRA, 16-bit", as_it_is),
    "PEFT RandLoRA": ("PEFT RandLoRA", as_it_is),
    "PEFT RandLoRA, 16-bit": ("PEFT RandLoRA, 16-bit", as_it_is),
    "PEFT RandLoRA, accelerated": ("PEFT RandLoRA, accelerated", as_it_is),
    "PyTorch, compiled": ("PyTorch, compiled", as_it_is),
    "randlora, not cached": ("randlora", as_it_is),
    "randlora, cached": ("randlora", keep_updates),
    "randlora, merged": ("randlora", merge),
    "randlora very_sparse, not cached": ("randlora very_sparse", as_it_is),
    "randlora very_sparse, cached": ("randlora very_sparse", keep_updates),
    "randlora hadamard": ("randlora hadamard", as_it_is),
}


def work(model: nn.Module, size: Size, new: int) -> Work:
    """Every word but the last goes through all linear layers (the head: new ones only), which are read once a word."""
    head = model.get_output_embeddings()
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    tokens = size.batch * (size.tokens + new - 1)
    skipped = size.batch * (size.tokens - 1) * head.weight.numel()
    return Work(tokens * linear - skipped, new * linear * size.dtype.itemsize)


def case(shape: Shape, size: Size, setting: methods.Setting, names: list[str], options: argparse.Namespace) -> Case:
    names = [name for name in names if size.dtype.itemsize <= 2 or not name.endswith("16-bit")]

    def set_up() -> Setup:
        decoding = Decoding(shape, size, setting, options.device, options.new)

        def extra(result: Comparison) -> tuple[Columns, bool]:
            done = {name: timing.median for name, timing in result.timings.items() if timing.samples}
            found = {name: {"tokens_per_second": round(size.batch * options.new / t, 1)} for name, t in done.items()}
            for name, row in found.items():
                print(f"  {name}: {row['tokens_per_second']:,} tokens/s")
                if name in decoding.peak:
                    row["peak_bytes"] = decoding.peak[name]
            return found, result.interrupted

        return Setup(
            {name: functools.partial(decoding.provider, name) for name in names},
            baseline=BASELINE if BASELINE in names else names[0],
            check=lambda result: result[-1],  # done when it was set up
            dtype=size.dtype,
            work=work(decoding.model, size, options.new),
            extra=extra,
        )

    title = f"{shape.title(size, training=False)}, then {options.new} new ones, r = {options.rank}"
    return Case(title, model.columns(shape, size, setting) | {"new_tokens": options.new}, set_up)


def whole_models(options: argparse.Namespace) -> None:
    on_cpu = torch.device(options.device).type == "cpu"
    default = MODELS[:1] if on_cpu or options.quick else [name for name in MODELS if name in PUBLISHED]
    usual = [name for name in PROVIDERS if not options.quick or name in QUICK]
    names = model.chosen(options.methods, PROVIDERS, usual, ";", "method")
    batches = (options.batch,) if options.batch else BATCHES[:1] if options.quick else BATCHES
    cases = []
    for batch in batches:
        for shape, size, setting, _ in model.models(options, default, batch=batch, tokens=options.tokens or PROMPT):
            if not shape.causal:
                raise SystemExit(f"{shape.name} is no language model; there are: {', '.join(MODELS)}")
            cases.append(case(shape, size, setting, names, options))
    questions.answer(records.Book("generate", KEY, options), cases, options)


def add_options(parser: argparse.ArgumentParser) -> None:
    model.add_options(parser, PROVIDERS, MODELS)
    parser.add_argument("--new", type=int, default=NEW, help=f"new tokens of a turn (default: {NEW})")
    parser.add_argument("--layers", action="store_true", help="single layers instead of whole models")


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("generate", __doc__, argv, add=add_options)
    (one_token.layers if options.layers else whole_models)(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
