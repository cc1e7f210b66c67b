"""What bench/correct.py asks: checks of every op, form of the bases and strategy, small, with random parameters."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from bench.correct_hadamard import hadamard_checks
from bench.correct_problems import ALLOWED, DTYPES, KINDS, SCALE, SEED, Check, Problem, forms, given, name_of, normal

LAYERS = ((40, 72), (72, 40), (64, 64), (41, 107), (107, 41))  # in, out: wide, tall, aligned, odd
FEW_LAYERS = ((64, 96), (107, 41))
DROPOUT = 0.3


# ---- bases ----


def bases_checks(device: torch.device, few: bool) -> Iterator[Check]:
    import randlora

    for kind in KINDS:
        for shape in ((341, 41, 5), (96, 64, 8))[: 1 if few else 2]:
            bases = randlora.RandomBases(*shape, kind=kind, seed=SEED)

            def same_bits(bases=bases, kind=kind) -> list[tuple[Tensor, Tensor]]:
                assert bases.to(device).fingerprint() == bases.fingerprint(), "fingerprints differ"
                pairs = []
                for dtype in DTYPES if kind == "dense" else (torch.int8, *DTYPES):
                    pairs += zip(bases.draw(dtype, device), bases.draw(dtype, torch.device("cpu")), strict=True)
                return pairs

            yield Check({"op": "bases", "kind": kind, "shape": shape}, ("A", "B") * 5, 0, same_bits)


# ---- ops ----


def layer_checks(device: torch.device, few: bool) -> Iterator[Check]:
    op, op_backward = torch.ops.randlora.linear, torch.ops.randlora.linear_backward

    for kind in KINDS:
        for sizes in FEW_LAYERS if few else LAYERS:
            problem = Problem(kind, *sizes)
            seed = torch.tensor([SEED])
            mask = torch.ops.randlora.dropout(torch.ones_like(problem.x), seed, DROPOUT)
            references = {0.0: problem.expected(1.0), DROPOUT: problem.expected(mask)}
            for form in forms(kind, device):
                for strategy in ("factored", "materialized", "merged"):
                    for dropout in (0.0, DROPOUT)[: 1 if strategy == "merged" else 2]:
                        for dtype in DTYPES:

                            def run(
                                problem=problem, form=form, strategy=strategy, dropout=dropout, dtype=dtype, seed=seed,
                                expected=references[dropout],
                            ) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
                                x, g, weight, bias = (
                                    t.to(device, dtype) for t in (problem.x, problem.g, problem.weight, problem.bias)
                                )
                                lam, gamma = (
                                    t.to(device, torch.promote_types(dtype, torch.float32))
                                    for t in (problem.lam, problem.gamma)
                                )
                                A, B, pattern = given(problem.bases, form, dtype, device)
                                others = A, B, lam, gamma, pattern, seed.to(device)
                                options = {
                                    "scale": problem.scale, "dtype": dtype, "strategy": strategy, "dropout": dropout,
                                    "weight_is_transposed": False, "workspace": 0,
                                }  # fmt: skip
                                y = op(x, weight, bias, *others, out_features=g.shape[1], **options)
                                gradients = op_backward(
                                    g, x, weight, *others, need_x=True, need_lambda=True, need_gamma=True, **options
                                )
                                return list(zip((y, *gradients), expected, strict=True))

                            about = {"op": "layer", "kind": kind, "form": form, "strategy": strategy,
                                     "dropout": dropout, "dtype": name_of(dtype), "shape": sizes}  # fmt: skip
                            yield Check(about, ("y", "dx", "dlambda", "dgamma"), ALLOWED[dtype], run)


def unique_base_checks(device: torch.device, few: bool) -> Iterator[Check]:
    ops, promote = torch.ops.randlora, torch.promote_types
    pairs = [(dtype, dtype) for dtype in DTYPES] + [(dtype, torch.float32) for dtype in DTYPES[2:]]
    for r, n, m in ((8, 3, 64), (32, 11, 341)) if few else ((8, 3, 64), (32, 11, 341), (5, 1, 1), (3, 2, 4099)):
        for dtype, parameter_dtype in pairs:

            def run(r=r, n=n, m=m, dtype=dtype, parameter_dtype=parameter_dtype) -> list[tuple[Tensor, Tensor]]:
                A, G = normal(r, 1, m, seed=1), normal(r, n, m, seed=2)
                lam, gamma = normal(r, n, seed=3), normal(n, m, seed=4)
                S = ops.unique_base(*_to(device, (A, dtype), (lam, parameter_dtype), (gamma, parameter_dtype)), SCALE)
                factors = _to(device, (G, promote(dtype, parameter_dtype)), (A, dtype), (lam, parameter_dtype),
                              (gamma, parameter_dtype))  # fmt: skip
                dlam, dgamma = ops.unique_base_backward(*factors, SCALE)
                t = SCALE * G * A
                return [
                    (S, SCALE * lam[:, :, None] * A * gamma), (dlam, (t * gamma).sum(2)),
                    (dgamma, (t * lam[:, :, None]).sum(0)),
                ]  # fmt: skip

            about = {"op": "unique_base", "dtype": f"{name_of(dtype)}, {name_of(parameter_dtype)}", "shape": (r, n, m)}
            yield Check(about, ("S", "dlambda", "dgamma"), ALLOWED[dtype], run)


def _to(device: torch.device, *pairs: tuple[Tensor, torch.dtype]) -> list[Tensor]:
    return [t.to(device, dtype) for t, dtype in pairs]


def sparse_checks(device: torch.device, few: bool) -> Iterator[Check]:
    """Updates by themselves: with the weight by rows, by columns and without it, in every form that there is."""
    from randlora.ops.pattern import ListTensors

    ops = torch.ops.randlora
    for kind, sizes in (
        ("sparse", (41, 107)),
        ("sign", (64, 96)),
        ("very_sparse", (41, 107)),
        ("very_sparse", (8, 70001)),
    ):
        if few and sizes[1] > 1000:
            continue
        problem = Problem(kind, *sizes)
        for form in forms(kind, device):
            for dtype in DTYPES:
                accumulator = torch.promote_types(dtype, torch.float32)

                def run(
                    problem=problem, form=form, dtype=dtype, accumulator=accumulator
                ) -> list[tuple[Tensor, Tensor]]:
                    _, _, pattern = given(problem.bases, form, dtype, device)
                    lam, gamma = (t.to(device, accumulator) for t in (problem.lam, problem.gamma))
                    options = problem.M, problem.scale
                    rows = ListTensors(*pattern).columns.long().cpu() if form == "lists" else torch.arange(problem.m)
                    D, W = problem.update(problem.lam, problem.gamma).T, problem.weight.T  # [m, M]
                    by_rows, by_columns = W.contiguous().to(device, dtype), problem.weight.to(device, dtype).T
                    G = normal(len(rows), problem.M, seed=7)
                    leaves = [t.clone().requires_grad_() for t in (problem.lam, problem.gamma)]
                    gradients = torch.autograd.grad(problem.update(*leaves).T[rows], leaves, G)
                    found = ops.sparse_update_backward(G.to(device, accumulator), pattern, lam, gamma, problem.scale,
                                                       True, True)  # fmt: skip
                    return [
                        (ops.sparse_update(pattern, lam, gamma, *options, None, dtype), D[rows]),
                        (ops.sparse_update(pattern, lam, gamma, *options, by_rows, dtype), D + W),
                        (ops.sparse_update(pattern, lam, gamma, *options, by_columns, dtype), D + W),
                        *zip(found, gradients, strict=True),
                    ]

                about = {"op": "sparse_update", "kind": kind, "form": form, "dtype": name_of(dtype), "shape": sizes}
                yield Check(about, ("D", "rows", "columns", "dlambda", "dgamma"), ALLOWED[dtype], run)


def bit_checks(device: torch.device, few: bool) -> Iterator[Check]:
    """What must have the CPU's bits: masks, and packed bases made dense."""
    ops, cpu = torch.ops.randlora, torch.device("cpu")
    for dtype in DTYPES:
        for size in (37 * 341, 4096):

            def masks(dtype=dtype, size=size) -> list[tuple[Tensor, Tensor]]:
                x, seed = normal(size, seed=1).to(dtype), torch.tensor([SEED])
                return [(ops.dropout(x.to(device), seed.to(device), DROPOUT), ops.dropout(x, seed, DROPOUT))]

            yield Check({"op": "dropout", "dtype": name_of(dtype), "shape": (size,)}, ("y",), 0, masks)
        for kind in ("sparse", "sign"):
            for sizes in ((64, 96), (41, 107)):
                for form in forms(kind, device):

                    def dense(kind=kind, sizes=sizes, form=form, dtype=dtype) -> list[tuple[Tensor, Tensor]]:
                        bases = Problem(kind, *sizes).bases
                        arguments = bases.num_bases, bases.min_dim, bases.max_dim, dtype, 3, 4
                        return list(zip(ops.packed_expand(given(bases, form, dtype, device)[2], *arguments),
                                        ops.packed_expand(given(bases, form, dtype, cpu)[2], *arguments),
                                        strict=True))  # fmt: skip

                    about = {"op": "packed_expand", "kind": kind, "form": form, "dtype": name_of(dtype), "shape": sizes}
                    yield Check(about, ("A", "B2"), 0, dense)


def checks(device: torch.device, few: bool, layers: bool = True) -> Iterator[Check]:
    for some in (bases_checks, bit_checks, unique_base_checks, sparse_checks, *([layer_checks] if layers else [])):
        yield from some(device, few)
    yield from hadamard_checks(device, few, layers)
