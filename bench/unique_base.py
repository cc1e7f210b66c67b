"""UniqueBaseGrad: what do the scaled base and its gradients cost?

S[k,i,j] = lambda[k,i] A[k,j] gamma[i,j], forward, backward and both. The plain PyTorch ones are the fastest of some
twenty formulations that were tried (NOTES.md), for small and for large bases; `compiled` is under torch.compile.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file: python bench/unique_base.py
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from bench import measure, questions, records
from bench.floors import Work
from bench.measure import Provider
from bench.questions import Case, Setup

CASES = ((32, 128, 4096, "float32"), (32, 24, 768, "float32"), (32, 128, 4096, "bfloat16"), (32, 24, 768, "bfloat16"))
PASSES = ("forward + backward", "forward", "backward")
BASELINE = "PEFT"
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.02}

Factors = tuple[Tensor, Tensor, Tensor]
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_in_place(A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    return (A * lam[:, :, None]).mul_(gamma)


def forward_broadcast(A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
    return lam[:, :, None] * A * gamma


def backward_sums(G: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    t = G * A
    return (t * gamma).sum(2), (t * lam[:, :, None]).sum(0)


def backward_rows(G: Tensor, A: Tensor, lam: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """Row k after row k, so that what is made from G[k] is used while it lies in the cache; sums in fp32."""
    dlam, dgamma = torch.empty_like(lam), torch.zeros_like(gamma, dtype=torch.float32)
    t, u = torch.empty_like(gamma), torch.empty_like(gamma)
    for k in range(A.shape[0]):
        torch.mul(G[k], A[k], out=t)
        torch.sum(torch.mul(t, gamma, out=u), 1, out=dlam[k])
        dgamma.addcmul_(t, lam[k][:, None])
    return dlam, dgamma.to(gamma.dtype)


def as_function(forward: Forward, backward: Backward) -> Forward:
    """The two as one autograd function that saves its inputs only, like PEFT's and ours."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
            ctx.save_for_backward(A, lam, gamma)
            return forward(A, lam, gamma)

        @staticmethod
        def backward(ctx, G: Tensor) -> tuple[None, Tensor, Tensor]:
            return None, *backward(G, *ctx.saved_tensors)

    return Function.apply


def peft() -> Forward:
    from peft.tuners.randlora.layer import UniqueBaseGrad

    return UniqueBaseGrad.apply


def randlora() -> Forward:
    from randlora.functional import unique_base

    return unique_base


COMPILED = {"fullgraph": True, "dynamic": False}


def compiled_expression() -> Forward:
    """The compiler makes the backward itself."""
    return torch.compile(forward_broadcast, **COMPILED)


def compiled_function() -> Forward:
    return as_function(torch.compile(forward_broadcast, **COMPILED), torch.compile(backward_sums, **COMPILED))


def compiled_into_kept_memory(like: Tensor) -> Forward:
    """No page faults, but every call overwrites the S of the last one: not what the other providers promise."""
    kept = torch.empty_like(like)

    def write(A: Tensor, lam: Tensor, gamma: Tensor) -> None:
        torch.mul(lam[:, :, None] * A, gamma, out=kept)

    write = torch.compile(write, **COMPILED)

    def forward(A: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
        write(A, lam, gamma)
        return kept.view_as(kept)

    return as_function(forward, torch.compile(backward_sums, **COMPILED))


def functions(like: Tensor) -> dict[str, Callable[[], Forward]]:
    """name -> what sets the function up; `like` has S's size and type."""
    return {
        "randlora": randlora,
        BASELINE: peft,
        "PyTorch, whole tensors": lambda: as_function(forward_in_place, backward_sums),
        "PyTorch, row by row": lambda: as_function(forward_in_place, backward_rows),
        "compiled expression": compiled_expression,
        "compiled function": compiled_function,
        "compiled, into kept memory": lambda: compiled_into_kept_memory(like),
    }


def provider(make: Callable[[], Forward], which: str, factors: Factors, G: Tensor) -> Provider:
    A, lam, gamma = factors
    function = make()
    if which == "forward":  # as in training: what backward needs is kept
        return Provider(lambda: (function(A, lam, gamma),))

    def both() -> tuple[Tensor, ...]:
        S = function(A, lam, gamma)
        return S, *torch.autograd.grad(S, (lam, gamma), G)

    if which == "backward":
        return Provider(lambda S: torch.autograd.grad(S, (lam, gamma), G), prepare=lambda: function(A, lam, gamma))
    return Provider(both)


def floor(which: str, G: Tensor) -> Provider:
    """Writing a tensor of S's size into fresh memory, reading one, or both."""

    def run() -> tuple[Tensor, ...]:
        written = (torch.zeros_like(G),) if which != "backward" else ()
        return (*written, G.sum()) if which != "forward" else written

    return Provider(run, checked=False)


class Check:
    """Largest relative error against float64."""

    def __init__(self, which: str, factors: Factors, G: Tensor, tolerance: float) -> None:
        A, lam, gamma = (t.detach().double() for t in factors)
        S = forward_broadcast(A, lam, gamma)
        gradients = backward_sums(G.double(), A, lam, gamma)
        self.expected = {"forward": (S,), "backward": gradients}.get(which, (S, *gradients))
        self.tolerance = tolerance

    def __call__(self, result: tuple[Tensor, ...]) -> float:
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(result, self.expected, strict=True)]
        assert max(errors) < self.tolerance, f"relative errors {errors}"
        return max(errors)


def case(which: str, r: int, n: int, m: int, dtype: str, options: argparse.Namespace) -> Case:
    def set_up() -> Setup:
        torch.manual_seed(0)
        torch.compiler.reset()  # every case is the compiler's first
        like = {"dtype": getattr(torch, dtype), "device": options.device}
        A, G = torch.randn(r, 1, m, **like), torch.randn(r, n, m, **like)
        lam, gamma = torch.randn(r, n, **like).requires_grad_(), torch.randn(n, m, **like).requires_grad_()
        factories = {
            name: functools.partial(provider, make, which, (A, lam, gamma), G)
            for name, make in functions(G).items()
            if not options.quick or "compiled" not in name
        }
        factories["floor: write S, read its gradient"] = functools.partial(floor, which, G)
        small = sum(t.nbytes for t in (A, lam, gamma))  # read forward; backward read, and lambda's and gamma's written
        moved = {"forward": G.nbytes + small, "backward": G.nbytes + 2 * small}
        return Setup(
            factories,
            baseline=BASELINE,
            check=Check(which, (A, lam, gamma), G, TOLERANCE[dtype]),
            dtype=like["dtype"],
            work=Work(0, moved.get(which, sum(moved.values()))),
        )

    columns = {"pass": which, "dtype": dtype, "r": r, "n": n, "m": m}
    return Case(f"unique_base {which} {dtype} {r} x {n} x {m}", columns, set_up)


def main(argv: list[str] | None = None) -> int:
    options = measure.parse("unique_base", __doc__, argv)
    book = records.Book("unique_base", ("pass", "dtype", "r", "n", "m"), options)
    cases = [
        case(which, *sizes, options)
        for sizes in (CASES[:2] if options.quick else CASES)
        for which in (PASSES[:1] if options.quick and sizes != CASES[0] else PASSES)
    ]
    questions.answer(book, cases, options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
