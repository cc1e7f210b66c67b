"""Random arguments for every op, right and wrong, in memory whose surroundings are watched (op_fuzz.py)."""

import math
from dataclasses import dataclass, field

import torch

import randlora
from helpers.common import FLOATS, FORMS, STRATEGIES, reference_dW

MARGIN = 512  # bytes around each tensor
CANARY = 0xA5


class Memory:
    """Tensors with a margin around them; `check` finds what was written that should not have been."""

    def __init__(self):
        self.kept = []

    def guard(self, t, writable=False):
        """The values and strides of `t`, in watched memory."""
        if t.is_meta or t.layout != torch.strided:
            return t
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        size = span * t.element_size()
        buffer = torch.full((MARGIN + size + MARGIN,), CANARY, dtype=torch.uint8)
        view = buffer[MARGIN : MARGIN + size].view(t.dtype).as_strided(t.shape, t.stride())
        if all(s for n, s in zip(t.shape, t.stride(), strict=True) if n > 1):
            view.copy_(t.detach())
        elif t.numel():  # expanded
            once = tuple(slice(None) if s or n == 1 else slice(1) for n, s in zip(t.shape, t.stride(), strict=True))
            view[once].copy_(t.detach()[once])
        self.kept.append((buffer, buffer.clone(), view if writable else None))
        return view.requires_grad_(t.requires_grad) if t.requires_grad else view

    def check(self):
        for buffer, before, view in self.kept:
            if view is not None and view.numel():
                offset = MARGIN // view.element_size()
                for whole in (buffer, before):
                    end = len(whole) - len(whole) % view.element_size()
                    torch.as_strided(whole[:end].view(view.dtype), view.shape, view.stride(), offset).zero_()
            assert torch.equal(buffer, before), "an op wrote outside the memory that it was given to write to"


@dataclass
class Call:
    """An op with its arguments by name. `expected`: its results in float64, unless the arguments were made wrong.

    `squares`: for each result, the sums of the squares of its terms. Their roots are its size in 16 bits, where terms
    of another sign leave a result of a few elements smaller than what rounding any of them costs, by luck.
    """

    op: str
    arguments: dict
    expected: object = None
    tolerance: float = 0.0
    wrong: list = field(default_factory=list)
    squares: list | None = None

    def __str__(self):
        def text(v):
            if isinstance(v, torch.Tensor):
                return (
                    f"{str(v.dtype)[6:]}{list(v.shape)} strides {v.stride() if v.layout == torch.strided else v.layout}"
                )
            return "[" + ", ".join(map(text, v)) + "]" if isinstance(v, list | tuple) else repr(v)

        inner = ", ".join(f"{name}={text(value)}" for name, value in self.arguments.items())
        return f"{self.op}({inner}), made wrong: {self.wrong or 'nothing'}"


class Draw:
    """What a case is drawn from: one seed gives one case."""

    def __init__(self, seed):
        self.rng = torch.Generator().manual_seed(seed)

    def int(self, low, high):
        return int(torch.randint(low, high + 1, (), generator=self.rng))

    def chance(self, p):
        return float(torch.rand((), generator=self.rng)) < p

    def of(self, choices):
        return choices[self.int(0, len(choices) - 1)]

    def normal(self, *shape, dtype=torch.float32):
        return torch.randn(shape, generator=self.rng, dtype=torch.float64).to(dtype)

    def size(self):
        return self.of((1, self.int(1, 5), self.int(1, 40), self.int(16, 17), self.int(40, 150)))

    def laid_out(self, t):
        """`t` with other strides, some of whose elements may be the same memory (and value)."""
        way = self.int(0, 5)
        if way == 1:
            return t.repeat_interleave(2, -1)[..., ::2]
        if way == 2 and t.dim() >= 2:
            return t.transpose(0, -1).contiguous().transpose(0, -1)
        if way == 3 and t.numel():
            return t[:1].expand(t.shape)
        return t

    def seed(self):
        return torch.tensor([self.int(0, 2**62)])


@dataclass
class Layer:
    """Sizes, bases that may be larger, and parameters of a layer."""

    d: Draw
    form: str = ""

    def __post_init__(self):
        d = self.d
        self.i, self.o, self.r = d.size(), d.size(), d.int(1, 6)
        self.form = self.form or d.of(list(FORMS))
        self.m, self.M = min(self.i, self.o), max(self.i, self.o)
        self.n = d.int(1, 4 + self.m // self.r)
        more = [d.of((0, 0, d.int(1, 20))) for _ in range(3)]
        self.bases = randlora.RandomBases(
            max(self.M, self.m + more[1]) + more[0],
            self.m + more[1],
            self.r,
            seed=d.int(0, 99),
            num_bases=self.n + more[2],
            **FORMS[self.form],
        )
        self.dtype = d.of(FLOATS)
        parameters = torch.float64 if self.dtype == torch.float64 else d.of((torch.float32, self.dtype))
        self.lam = d.laid_out(d.normal(self.r, self.n, dtype=parameters))
        gamma = d.normal(self.n, self.m, dtype=torch.float64) / math.sqrt(self.n * self.r)
        self.gamma = d.laid_out(gamma.to(parameters))
        found = self.bases.pattern(self.m)
        self.pattern, self.scale = ([], 1.0) if found is None else (found[0], found[1])
        self.A, self.B = (None, None) if found else self.bases.draw(self.dtype, torch.device("cpu"))
        self.tolerance = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}[
            self.dtype
        ]

    def update(self, lam, gamma, scale, power=1):
        """dW [out, in] in float64, differentiable; with power 2, of squares, the sums of the squares of its terms."""
        A, B = self.bases.draw(torch.float64, torch.device("cpu"))
        return reference_dW(A**power, B**power, lam, gamma, (scale * self.scale) ** power, self.i, self.o)


def exact(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def needed(gradients, needs):
    return [t if need else None for t, need in zip(gradients, needs, strict=True)]


def linear(d, backward):
    layer = Layer(d)
    strategy = d.of(STRATEGIES)
    p = 0.0 if strategy == "merged" else d.of((0.0, 0.5))
    shape = d.of(((), (d.int(0, 40),), (2, d.int(1, 3))))
    x, g = (d.laid_out(d.normal(*shape, size, dtype=layer.dtype)) for size in (layer.i, layer.o))
    transposed = d.chance(0.3)
    weight = (
        d.laid_out(d.normal(layer.o, layer.i, dtype=layer.dtype)) if strategy == "merged" or d.chance(0.6) else None
    )
    bias = d.laid_out(d.normal(layer.o, dtype=layer.dtype)) if weight is not None and d.chance(0.5) else None
    seed = d.seed()
    mask = torch.ops.randlora.dropout(torch.ones_like(x, dtype=torch.float64), seed, p) if p else 1.0

    def results(power, *leaves):
        y = torch.nn.functional.linear(leaves[0] * mask**power, layer.update(*leaves[1:], 0.7, power))
        if weight is not None:
            others = (None if t is None else t.double() ** power for t in (weight, bias))
            y = y + torch.nn.functional.linear(leaves[0], *others)
        return torch.autograd.grad(y, leaves, g.double() ** power) if backward else [y]

    leaves = exact(x, layer.lam, layer.gamma)
    expected = results(1, *leaves)
    squares = results(2, *exact(*(leaf**2 for leaf in leaves))) if layer.dtype.itemsize == 2 else None
    arguments = {
        "x": x, "weight": weight if weight is None or not transposed else weight.t(), "bias": bias,
        "A": layer.A, "B": layer.B, "randlora_lambda": layer.lam, "randlora_gamma": layer.gamma,
        "out_features": layer.o, "scale": 0.7 * layer.scale, "dtype": layer.dtype, "strategy": strategy, "dropout": p,
        "seed": seed if p or d.chance(0.2) else None, "weight_is_transposed": transposed,
        "workspace": d.of((0, 0, 1, 5000)), "pattern": list(layer.pattern),
    }  # fmt: skip
    if not backward:
        return Call("linear", arguments, expected, layer.tolerance, squares=squares)
    needs = [d.chance(0.7) for _ in range(3)]
    del arguments["bias"], arguments["out_features"]
    arguments = {"grad": g, **arguments}
    arguments.update(zip(("need_x", "need_lambda", "need_gamma"), needs, strict=True))
    return Call("linear_backward", arguments, needed(expected, needs), layer.tolerance, squares=squares)


def packed_update(d, backward):
    """``sparse_update``, or ``hadamard_update`` for Hadamard bases."""
    layer = Layer(d, d.of(("", "hadamard")))
    while len(layer.pattern) < 2:  # none, or a seed
        layer = Layer(d)
    op = "hadamard_update" if len(layer.pattern) == 4 else "sparse_update"
    dtype = layer.dtype
    lam, gamma = exact(layer.lam, layer.gamma)
    D = layer.update(lam, gamma, 0.7)
    D = D.T if layer.i <= layer.o else D
    compact = D if len(layer.pattern) < 5 else D[layer.pattern[0].long()]
    arguments = {"pattern": list(layer.pattern), "randlora_lambda": layer.lam, "randlora_gamma": layer.gamma}
    if backward:
        g = d.normal(*compact.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        needs = d.chance(0.7), d.chance(0.7)
        expected = torch.autograd.grad(compact, (lam, gamma), g.double())
        arguments = {"grad": g, **arguments, "scale": 0.7 * layer.scale}
        arguments.update(need_lambda=needs[0], need_gamma=needs[1])
        return Call(f"{op}_backward", arguments, needed(expected, needs), layer.tolerance)
    weight = None
    if d.chance(0.7):  # rows or columns as far apart as they like, or one and the same
        apart = d.of((0, 1, layer.M, layer.M + 3))
        strides = d.of(((apart, 1), (1, apart)))
        weight = d.normal((layer.M + 3) * (layer.M + 1), dtype=dtype).as_strided((layer.m, layer.M), strides)
    arguments.update(max_dim=layer.M, scale=0.7 * layer.scale, weight=weight, dtype=dtype)
    return Call(op, arguments, [compact if weight is None else weight.double() + D], layer.tolerance)


def products_of_tokens(d, which):
    """The update of tokens, or its gradients: the narrow side of a layer has m features, the wide one M."""
    layer, tokens = Layer(d, d.of(("hadamard", "lists"))), d.of((0, 1, d.int(2, 70)))
    kind = "hadamard" if layer.form == "hadamard" else "sparse"
    narrow, wide, into_narrow, into_wide = (
        d.normal(tokens, size, dtype=layer.dtype) for size in 2 * (layer.m, layer.M)
    )
    lam, gamma = exact(layer.lam, layer.gamma)
    D = layer.update(lam, gamma, 0.7)
    D = D.T if layer.i <= layer.o else D
    up, down = narrow.double() @ D, wide.double() @ D.T
    layer_arguments = {
        "pattern": list(layer.pattern), "randlora_lambda": layer.lam, "randlora_gamma": layer.gamma,
        "scale": 0.7 * layer.scale,
    }  # fmt: skip
    if which == "up":
        arguments = {"out": into_wide, "x": narrow, **layer_arguments}
        return Call(f"{kind}_up_", arguments, [into_wide.double() + up], layer.tolerance)
    if which == "down":
        arguments = {"out": into_narrow, "x": wide, **layer_arguments}
        return Call(f"{kind}_down_", arguments, [into_narrow.double() + down], layer.tolerance)
    expected = [*torch.autograd.grad((up * wide.double()).sum(), (lam, gamma), retain_graph=True)]
    all_into = {"into_narrow": into_narrow} | ({"into_wide": into_wide} if kind == "hadamard" else {})
    into = d.of((None, *all_into))
    arguments = {"narrow": narrow, "wide": wide, **dict.fromkeys(all_into), **layer_arguments}
    if into:
        arguments[into] = all_into[into]
        expected.append(arguments[into].double() + (down if into == "into_narrow" else up))
    return Call(f"{kind}_gradients", arguments, expected, layer.tolerance)


def packed_expand(d):
    layer = Layer(d)
    while len(layer.pattern) not in (2, 3):
        layer = Layer(d)
    first = d.int(0, layer.r - 1)
    rows = d.of((None, d.int(1, layer.r - first)))
    A, B = layer.bases.draw(torch.float64, torch.device("cpu"))
    end = layer.r if rows is None else first + rows
    expected = A[first:end, :, : layer.m], B[: layer.M, : layer.n].flatten(1).T[first * layer.n : end * layer.n]
    arguments = {"pattern": list(layer.pattern), "n": layer.n, "min_dim": layer.m, "max_dim": layer.M}
    arguments.update(dtype=layer.dtype, first=first, rows=rows)
    return Call("packed_expand", arguments, expected)


def unique_base(d, backward):
    r, n, m, dtype = d.int(1, 40), d.int(1, 20), d.size(), d.of(FLOATS)
    A, lam, gamma = (
        d.normal(r, 1, m, dtype=dtype),
        d.normal(r, n, dtype=d.of(FLOATS)),
        d.normal(n, m, dtype=d.of(FLOATS)),
    )
    lams, gammas = exact(lam, gamma)
    S = 0.7 * torch.einsum("ki,kj,ij->kij", lams, A.double()[:, 0], gammas)
    arguments = {"A": A, "randlora_lambda": lam, "randlora_gamma": gamma, "scale": 0.7}
    if not backward:
        return Call("unique_base", {**arguments, "dtype": d.of((None, *FLOATS))}, [S], 0.1)
    g = d.normal(r, n, m, dtype=d.of(FLOATS))
    needs = d.chance(0.7), d.chance(0.7)
    expected = torch.autograd.grad(S, (lams, gammas), g.double())
    arguments = {"grad": g, **arguments, "need_lambda": needs[0], "need_gamma": needs[1]}
    return Call("unique_base_backward", arguments, needed(expected, needs), 0.25)


def dropout(d):
    x = d.normal(*(d.int(0, 9) for _ in range(d.int(0, 3))), dtype=d.of(FLOATS))
    return Call("dropout", {"x": x, "seed": d.seed(), "p": d.of((0.0, 0.3, 0.999))}, "dropout", 0.01)


def fill_bases_(d):
    stream = d.of((0, 1, 3, 4, 5))
    signs = stream > 1
    sizes = [1 if signs else d.int(1, 9), d.int(1, 9) if stream == 1 else 1, d.size()]
    offsets = [0 if signs else d.int(0, 9), d.int(0, 9) if stream == 1 else 0, d.int(0, 9)]
    sparsity = None if signs else d.of((None, 1.0, 3.0, 50.0))
    dtype = d.of(FLOATS if sparsity is None and not signs else (*FLOATS, torch.int8))
    whole = torch.empty([size + offset for size, offset in zip(sizes, offsets, strict=True)], dtype=dtype)
    seed = d.int(-(2**62), 2**62)
    torch.ops.randlora.fill_bases_(whole, seed, stream, [0, 0, 0], sparsity)
    part = whole[offsets[0] :, offsets[1] :, offsets[2] :]
    out = torch.zeros(*sizes, dtype=dtype)
    if d.chance(0.3):
        out = torch.zeros(sizes[1], sizes[0], sizes[2] + 3, dtype=dtype).transpose(0, 1)[:, :, : sizes[2]]
    arguments = {"out": out, "seed": seed, "stream": stream, "offsets": offsets, "sparsity": sparsity}
    return Call("fill_bases_", arguments, [part.double()])


MAKERS = (
    lambda d: linear(d, False),
    lambda d: linear(d, True),
    lambda d: packed_update(d, False),
    lambda d: packed_update(d, True),
    lambda d: products_of_tokens(d, "up"),
    lambda d: products_of_tokens(d, "down"),
    lambda d: products_of_tokens(d, "gradients"),
    packed_expand,
    lambda d: unique_base(d, False),
    lambda d: unique_base(d, True),
    dropout,
    fill_bases_,
)
