"""One adapted layer: what does a training step of it cost, and which strategy should compute it?

Forward and backward of a d -> d layer on T tokens, r = 32, gradients for the input and the adapter. With --grid the
three strategies and `auto` alone, over many d and T: does `auto` take the best one?
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: python bench/linear.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import measure, plots, records
from bench.measure import Provider

RANK = 32
CASES = ((768, 2048, "float32"), (1024, 1024, "float32"), (1024, 4096, "float32"), (384, 8192, "float32"),
         (768, 2048, "bfloat16"), (1024, 1024, "bfloat16"))  # fmt: skip
GRID = tuple((d, T, "float32") for d in (256, 512, 1024, 2048) for T in (16, 128, 512, 1024, 2048, 16384))
BASELINE = "PEFT RandLoRA"
STRATEGIES = ("factored", "materialized", "merged")


class Case:
    """The tensors that all providers of one case share; lambda and gamma are random, so that nothing cancels out."""

    def __init__(self, d: int, T: int, dtype: torch.dtype, device: str) -> None:
        import randlora

        torch.manual_seed(0)
        self.d, self.dtype, self.device = d, dtype, device
        self.x = torch.randn(T, d, dtype=dtype, device=device, requires_grad=True)
        self.grad = torch.randn(T, d, dtype=dtype, device=device)
        self.base = nn.Linear(d, d, dtype=dtype, device=device).requires_grad_(False)
        self.bases = randlora.RandomBases(d, d, RANK)
        self.A, self.B = self.bases.tensors(dtype, torch.device(device))
        self.B2 = self.B.reshape(d, -1)
        n = d // RANK
        self.lam = torch.randn(RANK, n, device=device, requires_grad=True)
        self.gamma = (torch.randn(n, d, device=device) / d).requires_grad_()
        self.scaling = 1.0
        self._expected: list[Tensor] | None = None

    def step(self, function: Callable[[Tensor], Tensor], parameters: list[Tensor]) -> Provider:
        """A provider that runs `function` and its backward, and returns y and the gradients."""

        def run() -> list[Tensor]:
            y = function(self.x)
            return [y, *torch.autograd.grad(y, [self.x, *parameters], self.grad)]

        return Provider(run)

    def check(self, result: list[Tensor]) -> float:
        """Relative error against float64; the adapters with other parameters are not checked."""
        if self._expected is None:
            x, base, A, B = (t.detach().double() for t in (self.x, self.base.weight, self.A, self.B))
            lam, gamma = (t.detach().double().requires_grad_() for t in (self.lam, self.gamma))
            x.requires_grad_()
            S2 = (lam[:, :, None] * A * gamma).reshape(-1, self.d)
            y = x @ (base + self.scaling * B.reshape(self.d, -1) @ S2).T + self.base.bias.double()
            self._expected = [y.detach(), *torch.autograd.grad(y, [x, lam, gamma], self.grad.double())]
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(result, self._expected, strict=True)]
        allowed = 1e-4 if self.dtype == torch.float32 else 0.05
        assert max(errors) < allowed, f"relative errors {errors}"
        return max(errors)


def frozen(case: Case) -> Provider:
    return Provider(case.step(case.base, []).run, checked=False)


def peft(case: Case, config_name: str, fp32_adapter: bool = True) -> Provider:
    import peft

    model = nn.Sequential()
    model.add_module("layer", nn.Linear(case.d, case.d, dtype=case.dtype, device=case.device))
    model.layer.load_state_dict(case.base.state_dict())
    config = getattr(peft, config_name)(r=RANK, target_modules=["layer"])
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=fp32_adapter)
    layer = model.base_model.model.layer
    if config_name == "LoraConfig":
        trained = [p for p in model.parameters() if p.requires_grad]
        return Provider(case.step(model, trained).run, checked=False)  # another update than the others'
    with torch.no_grad():
        store = model.base_model
        for ours, theirs in ((case.A, store.randlora_A["default"]), (case.B, store.randlora_B["default"])):
            theirs.copy_(ours)
        layer.scaling["default"] = case.scaling
        layer.randlora_lambda["default"].copy_(case.lam)
        layer.randlora_gamma["default"].copy_(case.gamma)
    return case.step(model, [layer.randlora_lambda["default"], layer.randlora_gamma["default"]])


def backward_bmm(G: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """One product of the gradient's size, then two batched matrix-vector products over the bases."""
    t = (G * A).transpose(0, 1)
    return torch.bmm(t, gamma[:, :, None])[:, :, 0].T, torch.bmm(lam.T[:, None], t)[:, 0]


def scaled_base(case: Case, x: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    return ((lam * case.scaling)[:, :, None] * case.A * gamma).reshape(-1, case.d).to(x.dtype)


def forward(case: Case, strategy: str, x: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    weight, bias, B2, S2 = case.base.weight, case.base.bias, case.B2, scaled_base(case, x, lam, gamma)
    if strategy == "merged":
        return F.linear(x, torch.addmm(weight, B2, S2), bias)
    y = F.linear(x, weight, bias)
    return torch.addmm(y, F.linear(x, S2), B2.T) if strategy == "factored" else torch.addmm(y, x, (B2 @ S2).T)


def plain(case: Case, strategy: str) -> Provider:
    """The best plain PyTorch that, like randlora, keeps its inputs only and rebuilds the rest in backward."""
    weight, B2 = case.base.weight, case.B2

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
            ctx.save_for_backward(x, lam, gamma)
            return forward(case, strategy, x, lam, gamma)

        @staticmethod
        def backward(ctx, g: Tensor) -> tuple[Tensor, ...]:
            x, lam, gamma = ctx.saved_tensors
            S2 = scaled_base(case, x, lam, gamma)
            if strategy == "factored":
                dh = g @ B2
                dx, dS2 = torch.addmm(g @ weight, dh, S2), dh.T @ x
            else:
                update = torch.addmm(weight, B2, S2) if strategy == "merged" else B2 @ S2
                dx = g @ update if strategy == "merged" else torch.addmm(g @ weight, g, update)
                dS2 = B2.T @ (g.T @ x)
            dS = (dS2 * case.scaling).view(*lam.shape, case.d).to(lam.dtype)
            return dx, *backward_bmm(dS, case.A.to(lam.dtype), lam, gamma)

    return case.step(lambda x: Layer.apply(x, case.lam, case.gamma), [case.lam, case.gamma])


def plain_autograd(case: Case, strategy: str, compiled: bool = False) -> Provider:
    """The same forward, differentiated by PyTorch, which keeps what it likes (merged: W + dW, and S2)."""
    function = functools.partial(forward, case, strategy)
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # one code object serves every case and strategy
        function = torch.compile(function, fullgraph=True, dynamic=False)
    return case.step(lambda x: function(x, case.lam, case.gamma), [case.lam, case.gamma])


def ours(case: Case, strategy: str) -> Provider:
    from randlora.functional import linear

    def function(x: Tensor) -> Tensor:
        return linear(x, case.base.weight, case.base.bias, case.A, case.B, case.lam, case.gamma, case.scaling,
                      strategy=strategy)  # fmt: skip

    return case.step(function, [case.lam, case.gamma])


def providers(dtype: str) -> dict[str, Callable[[Case], Provider]]:
    # In 16 bits the merged form rounds small updates away: it is no way to compute the same thing.
    strategies = STRATEGIES if dtype == "float32" else STRATEGIES[:2]
    found = {"randlora auto": functools.partial(ours, strategy="auto")}
    found |= {f"randlora {s}": functools.partial(ours, strategy=s) for s in strategies}
    found[BASELINE] = functools.partial(peft, config_name="RandLoraConfig")
    if dtype != "float32":
        found["PEFT RandLoRA, 16-bit"] = functools.partial(peft, config_name="RandLoraConfig", fp32_adapter=False)
    found["PEFT LoRA"] = functools.partial(peft, config_name="LoraConfig")
    found |= {f"PyTorch {s}": functools.partial(plain, strategy=s) for s in strategies}
    if "merged" in strategies:
        found["PyTorch merged, autograd"] = functools.partial(plain_autograd, strategy="merged")
    found |= {
        f"PyTorch {s}, compiled": functools.partial(plain_autograd, strategy=s, compiled=True) for s in strategies
    }
    found["floor: frozen layer"] = frozen
    return found


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else list(argv)
    grid = "--grid" in argv
    options = measure.parse("linear", __doc__ + "\nFurther option: --grid", [a for a in argv if a != "--grid"])
    book = records.Book("linear-grid" if grid else "linear", ("dtype", "d", "T", "r"), options)
    for d, T, dtype in GRID if grid else CASES:
        title = f"linear {dtype} d={d} T={T}"
        if options.only and options.only not in title:
            continue
        print(f"{title}, r = {RANK}")
        case = Case(d, T, getattr(torch, dtype), options.device)
        wanted = {k: v for k, v in providers(dtype).items() if not grid or k.startswith("randlora")}
        result = measure.compare(
            title,
            {name: functools.partial(make, case) for name, make in wanted.items()},
            baseline="randlora auto" if grid else BASELINE,
            check=case.check,
            options=options,
        )
        print(measure.table(result))
        book.add({"dtype": dtype, "d": d, "T": T, "r": RANK}, result, {})
        if result.interrupted:
            break
    if not grid:
        plots.draw(book.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
