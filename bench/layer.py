"""One adapted d -> d layer under every method: made, checked against float64, and what it keeps and takes in memory.

All methods share input, gradient, weight and bases; lambda and gamma are random, so that nothing cancels out. Methods
that compute something else than RandLoRA are checked to leave the layer as it is at the start.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import floors, methods, peak, plain
from bench.floors import Work
from bench.measure import Provider
from bench.methods import FROZEN, FULL, METHODS, NOT_KEPT, Setting
from bench.training import saved_bytes

PASSES = ("forward + backward", "forward", "backward")
STRATEGIES = ("factored", "materialized", "merged")
KINDS = ("sparse", "very_sparse", "hadamard")
BOTH = PASSES[0]
LIKE_PYTORCH = {  # every way to write it, where "PyTorch" of METHODS is the cheapest of the rebuilding ones
    **{f"PyTorch {s}": functools.partial(methods.plain_pytorch, strategy=s) for s in STRATEGIES},
    "PyTorch merged, autograd": functools.partial(methods.plain_pytorch, function="autograd", strategy="merged"),
    "PyTorch, compiled": METHODS["PyTorch, compiled"],
}
TRANSFORMS = {  # of Hadamard bases
    "PyTorch transforms": methods.plain_transforms,
    "PyTorch transforms, compiled": functools.partial(methods.plain_transforms, fast=True),
}
FORCED = {f"randlora {s}": functools.partial(methods.own, strategy=s) for s in STRATEGIES}


@dataclass(frozen=True)
class Spec:
    """One case. `sparsity`: of ternary bases, where it is not the kind's own."""

    d: int = 1024
    T: int = 1024
    r: int = 32
    kind: str = "dense"
    dtype: str = "float32"
    which: str = BOTH
    device: str = "cpu"
    sparsity: float | None = None

    @property
    def columns(self) -> dict[str, str | int]:
        return {"pass": self.which, "kind": self.kind, "dtype": self.dtype, "d": self.d, "T": self.T, "r": self.r}

    def title(self, question: str) -> str:
        return f"{question} {self.which} {self.kind} {self.dtype} d={self.d} T={self.T} r={self.r}"


COLUMNS = tuple(Spec().columns)


def names(spec: Spec) -> list[str]:
    """The methods that make sense for a case, as a table lists them."""
    found = [FROZEN, FULL, "PEFT LoRA", "PEFT DoRA", "PEFT VeRA", "PEFT RandLoRA"]
    if spec.dtype != "float32":
        found += ["PEFT LoRA, 16-bit", "PEFT RandLoRA, 16-bit"]
    found += ["PEFT RandLoRA, accelerated", *LIKE_PYTORCH, "randlora", *FORCED]
    if spec.kind == "dense":
        found += [NOT_KEPT, *(f"randlora {kind}" for kind in KINDS)]
    if spec.kind == "hadamard":
        found += TRANSFORMS
    # In 16 bits the merged form rounds small updates away: it is no way to compute the same thing.
    return [name for name in found if spec.dtype == "float32" or "merged" not in name]


def known() -> dict[str, Callable[[nn.Module, Setting], nn.Module]]:
    return METHODS | LIKE_PYTORCH | FORCED | TRANSFORMS


class Layer:
    """The tensors that all methods of one case share."""

    def __init__(self, spec: Spec) -> None:
        torch.manual_seed(0)
        self.spec, self.dtype = spec, getattr(torch, spec.dtype)
        like = {"dtype": self.dtype, "device": spec.device}
        self.x = torch.randn(spec.T, spec.d, **like, requires_grad=True)
        self.grad = torch.randn(spec.T, spec.d, **like)
        self.net = nn.Sequential(OrderedDict(layer=nn.Linear(spec.d, spec.d, **like))).requires_grad_(False)
        self.setting = Setting(["layer"], spec.r, self.dtype)
        self.scaling = self.setting.alpha / spec.r
        self.bases = self.make_bases(spec.kind)
        n = self.bases.num_bases
        self.lam = torch.randn(spec.r, n, device=spec.device)
        self.gamma = torch.randn(n, spec.d, device=spec.device) / spec.d
        self.allowed = 1e-4 if self.dtype == torch.float32 else 0.05  # error of a result, relative
        self.saved: dict[str, int] = {}  # method -> bytes, known after its provider was made
        self._expected: dict[str, list[Tensor]] = {}  # by kind; "" is the layer alone

    def make_bases(self, kind: str, keep: bool = True):
        import randlora

        sparsity = {} if self.spec.sparsity is None else {"sparsity": self.spec.sparsity}
        return randlora.RandomBases(self.spec.d, self.spec.d, self.spec.r, kind, keep=keep, **sparsity)

    def drawn(self, kind: str) -> tuple[Tensor, Tensor]:
        """A and B of unit variance, as PEFT stores them."""
        bases, at = self.make_bases(kind), torch.device(self.spec.device)
        if bases.scale == 1:
            return bases.tensors(self.dtype, at)
        return tuple(t * bases.scale**0.5 for t in bases.draw(torch.float32, at))

    @property
    def bases_bytes(self) -> int:
        """Of randlora's bases of this case's kind, in the form that a layer takes them."""
        at = torch.device(self.spec.device)
        if self.bases.pattern(self.spec.d, at) is None:
            self.bases.tensors(self.dtype, at)
        return self.bases.nbytes

    # ---- a method ----

    def kind_of(self, name: str) -> str:
        """Of the bases that the method computes with; "" for no RandLoRA."""
        own = name.removeprefix("randlora ")
        if own in KINDS:
            return own
        if name == NOT_KEPT:  # others take no memory
            return "dense"
        if name in TRANSFORMS:
            return "hadamard"
        return self.spec.kind if name.startswith(("randlora", "PyTorch", "PEFT RandLoRA")) else ""

    def without_adapter(self, name: str) -> nn.Module:
        return methods.twin(self.net, own_weights=name == FULL)

    def make(self, name: str) -> nn.Module:
        model = self.without_adapter(name)
        if name.startswith("randlora"):
            sparsity = self.spec.sparsity if self.kind_of(name) == self.spec.kind else None
            strategy = name.removeprefix("randlora ") if name in FORCED else "auto"
            adapted = methods.own(model, self.setting, self.kind_of(name), strategy, sparsity, name != NOT_KEPT)
        else:
            adapted = known()[name](model, self.setting)
        if name.startswith(("PyTorch", "PEFT RandLoRA")) and name not in TRANSFORMS:
            A, B = self.drawn(self.spec.kind)
            if name.startswith("PEFT"):
                for key, values in (("randlora_A", A), ("randlora_B", B)):
                    getattr(adapted.base_model, key)["default"].copy_(values)
            else:
                adapted.layer.A, adapted.layer.B2 = A.to(self.dtype), B.to(self.dtype).flatten(1)
        with torch.no_grad():
            for pair in methods.pairs(adapted):
                pair.lam.copy_(self.lam)
                pair.gamma.copy_(self.gamma)
        return adapted

    def provider(self, name: str) -> Provider:
        adapted = self.make(name)
        self.saved[name], _ = saved_bytes(adapted, lambda: adapted(self.x))
        check = functools.partial(self.check, self.kind_of(name))
        which, wanted = self.spec.which, [self.x, *_trained(adapted)]
        if which == "forward":  # as in training: what backward needs is kept
            return Provider(lambda: [adapted(self.x)], check=check)
        if which == "backward":
            return Provider(
                lambda y: list(torch.autograd.grad(y, wanted, self.grad)), prepare=lambda: adapted(self.x), check=check
            )

        def both() -> list[Tensor]:
            y = adapted(self.x)
            return [y, *torch.autograd.grad(y, wanted, self.grad)]

        return Provider(both, check=check)

    def check(self, kind: str, result: list[Tensor]) -> float:
        """Relative error against float64: of everything for RandLoRA, of the result or dx where `kind` is ""."""
        if kind not in self._expected:
            self._expected[kind] = self._by_hand(kind)
        y, *gradients = self._expected[kind]
        expected = {"forward": [y], "backward": gradients}.get(self.spec.which, [y, *gradients])
        if kind:
            assert len(result) == len(expected), f"{len(result)} results, expected {len(expected)}"
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(result, expected, strict=False)]
        assert max(errors) < self.allowed, f"relative errors {[f'{error:.1e}' for error in errors]}"
        return max(errors)

    def _by_hand(self, kind: str) -> list[Tensor]:
        base = self.net.layer
        x, weight = self.x.detach().double().requires_grad_(), base.weight.double()
        if not kind:
            y = x @ weight.T + base.bias.double()
            return [y.detach(), *torch.autograd.grad(y, [x], self.grad.double())]
        A, B = (t.double() for t in self.drawn(kind))
        lam, gamma = (t.double().requires_grad_() for t in (self.lam, self.gamma))
        S2 = plain.scaled_base(A, lam, gamma, self.scaling, torch.float64)
        y = x @ (weight + B.flatten(1) @ S2).T + base.bias.double()
        return [y.detach(), *torch.autograd.grad(y, [x, lam, gamma], self.grad.double())]

    # ---- floors ----

    def work(self, name: str) -> Work:
        """RandLoRA's is that of its cheapest formulation with these bases, by the planner's count."""
        spec = self.spec
        sizes = spec.which, spec.T, spec.d, spec.d
        frozen = floors.frozen_layer(*sizes, self.dtype.itemsize)
        if name == FROZEN:
            return frozen
        if name == FULL:
            return floors.full_layer(*sizes, self.dtype.itemsize)
        if kind := self.kind_of(name):
            return self._randlora_work(kind, frozen, name != NOT_KEPT)
        method = name.removeprefix("PEFT ")
        rank = self.setting.vera_rank if method == "VeRA" else spec.r
        return frozen + floors.low_rank(*sizes, rank, self.dtype.itemsize, method)

    def _randlora_work(self, kind: str, frozen: Work, keep: bool) -> Work:
        from randlora import planner
        from randlora.costs.strategies import LayerCall

        spec, bases = self.spec, self.bases if kind == self.spec.kind and keep else self.make_bases(kind, keep)
        n = self.lam.shape[1]
        pattern = bases.pattern(spec.d, torch.device(spec.device))
        form = planner.form(pattern and pattern[0])
        call = LayerCall(spec.T, spec.d, spec.d, n, spec.r, self.dtype.itemsize, torch.device(spec.device).type)
        costs = planner.costs_of(call, form)
        if self.dtype.itemsize == 2:
            costs.pop("merged", None)
        forward, backward = (min(cost[i].multiply_adds for cost in costs.values()) for i in (0, 1))
        parameters = 4 * (self.lam.numel() + self.gamma.numel())
        stored = bases.nbytes if pattern else (spec.r * spec.d + spec.d * n * spec.r) * self.dtype.itemsize
        added = floors.beside(spec.which, Work(forward, parameters + stored), Work(backward, 2 * parameters + stored))
        return Work(added.multiply_adds, frozen.bytes + added.bytes)


def _trained(adapted: nn.Module) -> list[nn.Parameter]:
    found = [p for pair in methods.pairs(adapted) for p in (pair.lam, pair.gamma)]
    return found or [p for p in adapted.parameters() if p.requires_grad]


# ---- memory ----


def peak_bytes(spec: Spec, name: str) -> int:
    """Of a forward and backward, above what exists before and what it returns."""
    spec = dataclasses.replace(spec, which=BOTH)
    small = dataclasses.replace(spec, d=2 * spec.r, T=8)
    return peak.above_result(step_of, (spec, name), (small, name), spec.device)


def step_of(spec: Spec, name: str) -> Callable[[], list[Tensor]]:
    return Layer(spec).provider(name).run
