"""What several test modules share: devices, sizes, references in float64, error bounds, subprocesses."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import randlora

on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)
KINDS = ("dense", "hadamard", "sparse", "very_sparse", "sign")
STRATEGIES = ("factored", "materialized", "merged")
FORMS = {  # a kind of bases for each way that they are stored and computed with
    "dense": {"kind": "dense"},
    "seed": {"kind": "dense", "keep": False},
    "lists": {"kind": "very_sparse", "sparsity": 10.0},
    "planes": {"kind": "sparse"},
    "bits": {"kind": "sparse", "sparsity": 1.5},
    "sign": {"kind": "sign"},
    "hadamard": {"kind": "hadamard"},
}


def dtype_id(dtype):
    return str(dtype).removeprefix("torch.")


def over(name, dtypes):
    """Parametrise `name` over dtypes, with readable ids."""
    return pytest.mark.parametrize(name, dtypes, ids=dtype_id)


# Where there is dropout, no strategy merges.
strategies_and_dropout = pytest.mark.parametrize(
    "strategy, dropout", [(name, p) for p in (0.0, 0.3) for name in STRATEGIES if not (p and name == "merged")]
)


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    """Standard normal numbers that are the same on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def draw_factors(r, n, m, dtype=torch.float32, parameter_dtype=None, device="cpu"):
    """A, lambda and gamma, all random: with gamma constant most mistakes cancel out."""
    parameter_dtype = parameter_dtype or dtype
    return (
        normal(r, 1, m, seed=1, dtype=dtype, device=device),
        normal(r, n, seed=2, dtype=parameter_dtype, device=device),
        normal(n, m, seed=3, dtype=parameter_dtype, device=device),
    )


# ---- the mathematics, in float64 -------------------------------------------------------------------------------------


def reference_S(A, lam, gamma, scale=1.0):
    return scale * torch.einsum("ki,kj,ij->kij", lam.double(), A.double()[:, 0], gamma.double())


def reference_dW(A, B, lam, gamma, scaling, in_features, out_features):
    """dW [out, in], with the flattening that checkpoints depend on spelled out position by position."""
    (r, n), m, M = lam.shape, min(in_features, out_features), max(in_features, out_features)
    S = reference_S(A[:, :, :m], lam, gamma)
    p = torch.arange(n * r, device=S.device)
    S2, B2 = S[p // n, p % n], B.double()[:M, p // r, p % r]
    return scaling * (B2 @ S2 if in_features <= out_features else S2.T @ B2.T)


# ---- error bounds ----------------------------------------------------------------------------------------------------


def unit_roundoff(dtype):
    return torch.finfo(dtype).eps / 2


def assert_rounding_only(got, exact, magnitude, terms):
    """Every element is within the rounding of `got.dtype` and of a sum of `terms` products in fp32 (fp64 for fp64).

    `magnitude` is the sum of the absolute terms. The bound holds for any order of additions and for no 16-bit sum.
    """
    assert got.shape == exact.shape
    accumulator = torch.float64 if got.dtype == torch.float64 else torch.float32
    smallest = torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps  # spacing of subnormals
    bound = (
        1.001 * unit_roundoff(got.dtype) * exact.abs() + (terms + 4) * unit_roundoff(accumulator) * magnitude + smallest
    )
    worst = ((got.double() - exact).abs() / bound).max().item()
    assert worst <= 1, f"an error is {worst:.3g} times what rounding explains"


def assert_no_worse_than_plain(got, plain, exact):
    """The rule of the design: at most twice the error of the plain PyTorch expression in the same dtype.

    The correctly rounded result is always good enough, also where the plain expression was lucky.
    """
    assert got.dtype == plain.dtype and got.shape == plain.shape == exact.shape

    def error(t):
        return torch.linalg.vector_norm(t.double() - exact).item()

    allowed = 2 * max(error(plain), error(exact.to(got.dtype)))
    assert error(got) <= allowed, f"error {error(got):.3g}, allowed {allowed:.3g}"


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(a, b)


# ---- layers ----------------------------------------------------------------------------------------------------------


def randomize(layer, seed=0):
    """Random lambda and gamma for every adapter, such that dW has entries about the size of alpha / r."""
    with torch.no_grad():
        for i, name in enumerate(layer.randlora_lambda):
            lam, gamma = layer.randlora_lambda[name], layer.randlora_gamma[name]
            lam.copy_(normal(*lam.shape, seed=seed + 10 * i + 1, device=lam.device))
            gamma.copy_(normal(*gamma.shape, seed=seed + 10 * i + 2, device=gamma.device) * lam.numel() ** -0.5)
    return layer


def make_bases(in_features, out_features, r, **arguments):
    return randlora.RandomBases(max(in_features, out_features), min(in_features, out_features), r, **arguments)


def make_base(in_features, out_features, bias=True, dtype=torch.float32, device="cpu"):
    base = nn.Linear(in_features, out_features, bias=bias, dtype=dtype, device=device)
    with torch.no_grad():
        base.weight.copy_(normal(out_features, in_features, seed=4))
        if bias:
            base.bias.copy_(normal(out_features, seed=5))
    return base


def make_layer(in_features=41, out_features=24, r=5, bias=True, dtype=torch.float32, device="cpu", **arguments):
    """A randlora.Linear with random parameters and bases of its own; alpha / r is 1.5 unless given."""
    arguments.setdefault("randlora_alpha", 1.5 * r)
    if "randlora_A" not in arguments:
        arguments.setdefault("bases", make_bases(in_features, out_features, r))
    return randomize(randlora.Linear(make_base(in_features, out_features, bias, dtype, device), r=r, **arguments))


def reference_update(layer, adapter="default"):
    """dW of one adapter of a layer in float64."""
    bases = layer.bases[adapter].to(torch.float64)
    lam, gamma = layer.randlora_lambda[adapter].detach(), layer.randlora_gamma[adapter].detach()
    A, B = (t.to(lam.device) for t in (bases.A, bases.B))
    return reference_dW(A, B, lam, gamma, layer.scaling[adapter], layer.in_features, layer.out_features)


def reference_forward(layer, x, adapters=("default",)):
    weight = layer.weight.detach().double() + sum(reference_update(layer, name) for name in adapters)
    bias = None if layer.bias is None else layer.bias.detach().double()
    return nn.functional.linear(x.double(), weight, bias)


# ---- subprocesses ----------------------------------------------------------------------------------------------------


def run_python(code, folder, **environment):
    """Runs `code` in a new interpreter, outside the checkout, and returns the JSON it prints last."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
