"""Layers whose weight is cut over ranks compute what one process computes: outputs and all gradients."""

import random

import pytest
import torch
from helpers.common import KINDS, STRATEGIES, make_base, normal, randomize
from helpers.tensor_parallel import adapted, assert_equal, call, mesh, parallelize, same_as_alone
from torch import nn

import randlora

distributed = torch.distributed


# ---- what is computed ----

SIZES = [(12, 40), (40, 12), (16, 16), (13, 22), (22, 13), (7, 1)]


@pytest.mark.parametrize("way", ["columns", "rows"])
def test_a_layer_computes_what_it_computes_alone(two_ranks, way):
    kinds = [[kind] for kind in (*KINDS, "given", {"kind": "very_sparse", "sparsity": 12.0})] + [["dense", "hadamard"]]
    cases = [
        {
            "into": into,
            "out": out,
            "way": way,
            "kinds": kinds[(i + j) % len(kinds)],
            "before": bool((i + j // 2) % 2),
            "whole": bool(j % 2),
        }
        for i, (into, out) in enumerate(SIZES)
        for j in range(0, 8, 1 if (into, out) == (16, 16) else 3)
    ]
    two_ranks(same_as_alone, cases=cases)


def random_cases(count):
    choose = random.Random(5).choice
    kinds = [*KINDS, "given", {"kind": "very_sparse", "sparsity": 12.0}]
    return [
        {
            "into": choose(range(1, 24)), "out": choose(range(1, 24)), "way": choose(["columns", "rows"]),
            "kinds": [choose(kinds) for _ in range(choose([1, 1, 2]))], "before": choose([True, False]),
            "bias": choose([True, False]), "whole": choose([True, False]), "r": choose([1, 3, 4, 30]),
            "n": choose([None, 1, 7]),
            "strategy": choose(["auto", *STRATEGIES]), "tokens": choose([(0,), (1,), (5,), (2, 20)]),
        }
        for _ in range(count)
    ]  # fmt: skip


def test_so_does_any_layer(two_ranks):
    two_ranks(same_as_alone, cases=random_cases(40))


def in_any_dtype():
    """Bounds as of the whole layer: errors against float64, at most twice those of one process."""
    for dtype in (torch.float32, torch.bfloat16):
        for into, out in ((24, 40), (40, 24), (32, 32)):
            for way in ("columns", "rows"):
                exact = call(adapted(into, out))
                alone, parallel = (adapted(into, out, way=w) for w in (None, way))
                x = normal(6, into, seed=8)
                found = []
                for model in (alone, parallel):
                    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
                        model.float()
                        assert model[0].randlora_lambda["0"].dtype == torch.float32
                        y = model(x.view(2, 3, into))
                        expected_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
                        assert y.dtype == expected_dtype
                        (y * normal(2, 3, out, seed=9)).sum().backward()
                    found.append([y.detach(), *(p.grad for part in model[0].trained_parts() for p in part.values())])
                reference = [exact[0], *exact[2:]]
                for e, a, p in zip(reference, *found, strict=True):
                    size = torch.linalg.vector_norm(e)
                    errors = [torch.linalg.vector_norm(t.double() - e) / size for t in (a, p)]
                    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps, (dtype, into, out, way, errors)


def test_in_16_bits_it_is_as_exact(two_ranks):
    two_ranks(in_any_dtype)


# ---- what is sent ----


def sent(adapt):
    """Collectives with the numbers they carry, of a forward and a backward of a column- and a row-parallel layer."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace in ("c10d", "_c10d_functional") and "reduce" in func.__name__:
                first = args[0][0] if isinstance(args[0], list) else args[0]
                found.append((func.__name__.split(".")[0].strip("_"), first.numel()))
            return func(*args, **(kwargs or {}))

    found = []
    model = nn.Sequential(make_base(12, 40), nn.Tanh(), make_base(40, 12)).requires_grad_(False)
    for name, way in (("0", "columns"), ("2", "rows")):
        parallelize(model, way, name, whole=False)
    if adapt:
        for i in (0, 2):
            model[i] = randlora.Linear(model[i], r=4, num_bases=3)
    x = normal(5, 12).requires_grad_()
    with Counting():
        model(x).sum().backward()
    return found


def test_only_the_gradients_of_lambda_and_gamma_are_sent(two_ranks):
    (plain, *_), (adapted_, *_) = two_ranks(sent, adapt=False), two_ranks(sent, adapt=True)
    of_activations, of_parameters = 5 * 12, 4 * 3 + 3 * 12
    assert sorted(plain) == [("all_reduce", of_activations)] * 2
    assert sorted(adapted_) == sorted([*plain, ("allreduce", of_parameters), ("allreduce", of_parameters)])


def bytes_of_bases():
    found = {}
    for way in ("columns", "rows"):
        model = adapted(32, 64, way=way, r=4)
        call(model)
        found[way] = model[0].bases["0"].nbytes
    return found


def test_a_rank_makes_the_part_of_the_bases_that_it_needs(two_ranks):
    r, n, item = 4, 8, 8
    expected = {"columns": (r * 32 + 32 * n * r) * item, "rows": (r * 16 + 64 * n * r) * item}
    assert two_ranks(bytes_of_bases) == [expected, expected]


def bases_not_kept():
    """They are made for every pass, the same bits, and neither the bases nor autograd hold them in between."""
    held = []
    for way in ("columns", "rows"):
        model = adapted(32, 64, way=way, r=4)
        expected, store = call(model), model[0].bases["0"]
        store.keep = False
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.shape) or t, lambda t: t):
            assert all(torch.equal(a, b) for a, b in zip(expected, call(model), strict=True))
        held.append((store.nbytes, any(len(shape) == 3 and shape[-1] == 4 for shape in saved)))
        with torch.no_grad():
            model(normal(3, 32, dtype=torch.float64))
    return held


def test_bases_that_are_not_kept(two_ranks):
    assert two_ranks(bases_not_kept) == [[(0, False)] * 2] * 2


def given_bases_that_are_written_to():
    for way in ("columns", "rows"):
        A, B = normal(3, 1, 12, seed=5).double(), normal(40, 4, 3, seed=6).double()
        models = []
        for w in (None, way):
            layers = adapted(12, 40, way=w, n=4)
            layers[0].update_layer("given", A, B, r=3, num_bases=4, init_weights=False)
            layers[0].set_adapter("given")
            models.append(randomize(layers[0]) and layers)
        before = call(models[0])
        assert_equal(before, call(models[1]))
        with torch.no_grad():
            B.mul_(-0.5)
        now = call(models[0])
        assert_equal(now, call(models[1]))
        assert (now[0] - before[0]).abs().max() > 0.1


def test_what_is_written_to_given_bases_is_seen(two_ranks):
    two_ranks(given_bases_that_are_written_to)


# ---- layouts ----


def layouts():
    """Whatever layout the input comes in, and where the weight is whole on every rank."""
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    here = mesh()
    expected = call(adapted(12, 20))
    for cut in (Shard(0), Shard(1), Replicate()):
        for of_x in (Replicate(), Shard(0), Shard(1), Shard(2)):
            model = adapted(12, 20)
            base = model[0].get_base_layer()
            base.weight = nn.Parameter(distribute_tensor(base.weight.detach(), here, [cut]), requires_grad=False)
            of_bias = Shard(0) if cut == Shard(0) else Replicate()
            base.bias = nn.Parameter(distribute_tensor(base.bias.detach(), here, [of_bias]), requires_grad=False)
            x = distribute_tensor(normal(2, 3, 12, seed=8, dtype=torch.float64), here, [of_x]).requires_grad_()
            g = distribute_tensor(normal(2, 3, 20, seed=9, dtype=torch.float64), here, [Replicate()])
            y = model(x)
            assert isinstance(y, DTensor)
            (y * g).sum().backward()
            found = [y.full_tensor(), x.grad.full_tensor()]
            found += [p.grad for part in model[0].trained_parts() for p in part.values()]
            try:
                assert_equal(expected, found)
            except AssertionError as error:
                raise AssertionError(f"{cut}, {of_x}") from error


def test_any_layout_of_the_input_is_right(two_ranks):
    two_ranks(layouts)


# ---- compiled ----


def compiled():
    for kind, way in (("dense", "columns"), ("hadamard", "rows")):
        model = adapted(12, 20, way=way, kinds=[kind])
        expected = call(model)
        graph = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_equal(expected, call(model, through=graph))
    model = adapted(12, 20, way="columns", randlora_dropout=0.4)
    through = None, torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_equal(*(torch.manual_seed(3) and call(model, through=way) for way in through))


def test_one_graph_of_torch_compile(two_ranks):
    two_ranks(compiled)


# ---- what is refused ----


class Twice(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(nn.functional.linear(x, self.weight), self.weight)


def refused():
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    x = normal(2, 12, dtype=torch.float64)
    for way in ("columns", "rows"):
        model = adapted(12, 20)
        before = list(model.state_dict())
        with pytest.raises(ValueError, match="a parallel plan must name itself"):
            parallelize(model, way, "0")
        assert list(model.state_dict()) == before and torch.isfinite(model(x)).all()

    model = adapted(12, 20)
    base = model[0].get_base_layer()
    base.weight = nn.Parameter(DTensor.from_local(base.weight.detach(), mesh(), [Partial()]), requires_grad=False)
    with pytest.raises(ValueError, match=r"must be cut by columns, Shard\(0\), or by rows"):
        model(x)

    model = adapted(12, 20, way="columns")
    lam = model[0].randlora_lambda
    lam["0"] = nn.Parameter(distribute_tensor(lam["0"].detach(), mesh(), [Replicate()]))
    with pytest.raises(ValueError, match="leave them out of the parallel plan"):
        model(x)

    layer = randlora.Linear(Twice(12, 12, dtype=torch.float64), r=3)
    parallelize(layer, "columns", "base_layer")
    with pytest.raises(TypeError, match="computed 2 of them"):
        layer(x)

    attention = nn.MultiheadAttention(12, 2)
    parallelize(attention, "rows", "out_proj")
    with pytest.raises(ValueError, match="adapt it first"):
        randlora.MultiheadAttention(attention, r=3)


def test_what_cannot_be_computed_is_refused(two_ranks):
    two_ranks(refused)


def attention():
    """Projections whose base layers are cut after the attention was adapted."""
    x = normal(2, 5, 12, dtype=torch.float64)
    layer = randlora.MultiheadAttention(nn.MultiheadAttention(12, 2, batch_first=True, dtype=torch.float64), r=3)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        randomize(getattr(layer, name))
    expected = layer(x, x, x)[0]
    for name, way in (("q_proj", "columns"), ("k_proj", "columns"), ("v_proj", "columns"), ("out_proj", "rows")):
        parallelize(layer, way, f"{name}.base_layer")
    torch.testing.assert_close(layer(x, x, x)[0], expected)


def test_attention_of_torch(two_ranks):
    two_ranks(attention)
