"""A meta tensor beside real ones: every op refuses it by name, whichever argument it is. Meta alone is fine."""

import contextlib
import itertools
import re

import pytest
import torch
from helpers.common import make_layer, normal
from helpers.layer_op import draw_layer
from helpers.ternary import ALL_FORMS, draw
from torch._subclasses.fake_tensor import FakeTensorMode

import randlora
from randlora.layers.mixed_batch import mixed_batch

_ops = torch.ops.randlora


def calls():
    """name -> op, valid arguments by the names of its schema."""
    x, weight, bias, A, B, lam, gamma = (t.detach() for t in draw_layer((24, 41, 5), torch.float32))
    grad, seed = torch.ones(*x.shape[:-1], 41), torch.tensor([3])
    bases = {"randlora_lambda": lam, "randlora_gamma": gamma}
    S = normal(*lam.shape, 24)
    found = {
        "unique_base": (_ops.unique_base, {"A": A[:, :, :24], **bases}),
        "unique_base_backward": (_ops.unique_base_backward, {"grad": S, "A": A[:, :, :24], **bases}),
        "dropout": (_ops.dropout, {"x": x, "seed": seed, "p": 0.5}),
    }
    options = {
        "scale": 1.0, "dtype": torch.float32, "strategy": "materialized", "dropout": 0.5, "seed": seed,
        "weight_is_transposed": False, "workspace": 0, "pattern": [],
    }  # fmt: skip
    layer = {"x": x, "weight": weight, "bias": bias, "A": A, "B": B, **bases, "out_features": 41, **options}
    backward = {"grad": grad, "x": x, "weight": weight, "A": A, "B": B, **bases, **options}
    backward |= {"need_x": True, "need_lambda": True, "need_gamma": True}
    found["linear"], found["linear_backward"] = (_ops.linear, layer), (_ops.linear_backward, backward)
    for form in ("lists", "planes", "bits", "hadamard"):
        _, _, _, lam, gamma, store = draw((24, 41, 5), form, dtype=torch.float32)
        bases = {"randlora_lambda": lam.detach(), "randlora_gamma": gamma.detach()}
        pattern = {"pattern": list(store.pattern(24)[0])}
        rows = torch.ones(pattern["pattern"][0].numel() if form == "lists" else 24, 41)
        without = {"A": None, "B": None, **bases, **pattern}
        found[f"linear, {form}"] = _ops.linear, layer | without
        found[f"linear_backward, {form}"] = _ops.linear_backward, backward | without
        update = {**pattern, **bases, "max_dim": 41, "scale": 1.0, "weight": None, "dtype": torch.float32}
        kind = "hadamard" if form == "hadamard" else "sparse"
        build, build_backward = (getattr(_ops, f"{kind}_update{end}") for end in ("", "_backward"))
        found[f"{kind}_update, {form}"] = build, update
        found[f"{kind}_update with a weight, {form}"] = build, update | {"weight": weight.t()}
        found[f"{kind}_update_backward, {form}"] = build_backward, {
            "grad": rows, **pattern, **bases, "scale": 1.0, "need_lambda": True, "need_gamma": True
        }  # fmt: skip
        if form in ("hadamard", "lists"):
            narrow, wide = normal(7, 24), normal(7, 41, seed=1)
            parts = {**pattern, **bases, "scale": 1.0}
            up, down, gradients = (getattr(_ops, f"{kind}_{end}") for end in ("up_", "down_", "gradients"))
            found[f"{kind}_up_"] = up, {"out": wide.clone(), "x": narrow, **parts}
            found[f"{kind}_down_"] = down, {"out": narrow.clone(), "x": wide, **parts}
            both = {"narrow": narrow, "wide": wide}
            all_into = {"into_narrow": narrow} | ({"into_wide": wide} if kind == "hadamard" else {})
            for into, t in all_into.items():
                given = dict.fromkeys(all_into) | {into: t.clone()}
                found[f"{kind}_gradients {into}"] = gradients, {**both, **given, **parts}
        else:
            sizes = {"n": 5, "min_dim": 24, "max_dim": 41, "dtype": torch.float32}
            found[f"packed_expand, {form}"] = _ops.packed_expand, pattern | sizes
    return found


CALLS = calls()


def places(arguments):
    """(name, index in the list or None) of every tensor."""
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            yield name, None
        elif isinstance(value, list):
            yield from ((name, i) for i in range(len(value)))


def moved(arguments, chosen, move):
    """The arguments with `move` applied to the tensors at these places."""
    result = {}
    for name, value in arguments.items():
        if isinstance(value, list):
            value = [move(t) if (name, i) in chosen else t for i, t in enumerate(value)]
        result[name] = move(value) if (name, None) in chosen else value
    return result


def tensors(result):
    return [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None and t.numel()]


every_call = pytest.mark.parametrize("call", CALLS)


def test_the_table_has_every_op():
    tables = {op._qualified_op_name.removeprefix("randlora::") for op, _ in CALLS.values()}
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("randlora::")}
    # Not those that take a single tensor, or give none.
    assert tables == {name.partition(".")[0] for name in names} - {"fill_bases_", "check_pattern"}


@every_call
def test_one_meta_tensor_is_refused_by_name(call):
    op, arguments = CALLS[call]
    op(**arguments)
    everything = list(places(arguments))
    for name, i in everything:
        if len(everything) == 1:
            continue
        for chosen in ([(name, i)], [place for place in everything if place != (name, i)]):
            mixed = moved(arguments, chosen, lambda t: t.to("meta"))
            words = r"(\S+) must be on the device of (\S+), (cpu, got meta|meta, got cpu)\."
            with pytest.raises(ValueError, match=words) as error:
                op(**mixed)
            refused, beside, devices = re.match(words, str(error.value)).groups()
            # The one that is alone on its device is refused, or the first that is not there with it.
            alone = name if i is None else f"{name}[{i}]"
            assert alone in (refused, beside) and refused != beside
            on_meta = {n if j is None else f"{n}[{j}]" for n, j in chosen}
            assert devices == ("cpu, got meta" if refused in on_meta else "meta, got cpu")
            assert "A meta tensor has a shape and no numbers" in str(error.value)


@every_call
def test_meta_tensors_alone_have_the_shapes_and_dtypes_of_the_result(call):
    op, arguments = CALLS[call]
    real, meta = op(**arguments), op(**moved(arguments, list(places(arguments)), lambda t: t.to("meta")))
    for got, expected in itertools.zip_longest(tensors(meta), tensors(real)):
        assert (got.shape, got.dtype, got.device.type) == (expected.shape, expected.dtype, "meta")


@every_call
def test_fake_tensors_of_two_devices_are_refused(call):
    op, arguments = CALLS[call]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        everything = list(places(arguments))
        fake = moved(arguments, everything, mode.from_tensor)
        assert all(t.device.type == "cpu" for t in tensors(op(**fake)))
        for place in everything if len(everything) > 1 else []:
            with pytest.raises(ValueError, match="must be on the device of"):
                op(**moved(fake, [place], lambda t: t.to("meta")))


@pytest.mark.parametrize("form", [None, *ALL_FORMS])
@pytest.mark.parametrize("name", ["randlora_lambda", "randlora_gamma"])
def test_layer_with_a_parameter_on_meta(form, name):
    bases = {} if form is None else {"bases": randlora.RandomBases(41, 24, 5, **ALL_FORMS[form])}
    layer = make_layer(24, 41, **bases)
    parameters = getattr(layer, name)
    parameters["default"] = torch.nn.Parameter(parameters["default"].detach().to("meta"))
    with pytest.raises(ValueError, match=rf"{name}\['default'\] is on the meta device"):
        layer(normal(3, 24))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("call", ["plain", "hooked", "disabled", "mixed", "cached"])
@pytest.mark.parametrize("sizes", [(24, 41), (41, 24)])
def test_layer_with_a_base_parameter_on_meta(name, call, sizes):
    """PyTorch's own product gives memory that nobody has written to for some of these."""
    layer, x = make_layer(*sizes).eval(), normal(3, sizes[0])
    base, names = layer.base_layer, ["default", "__base__", "default"]
    setattr(base, name, torch.nn.Parameter(getattr(base, name).detach().to("meta"), requires_grad=False))
    if call == "hooked":
        base.register_forward_hook(lambda module, args, y: 2 * y)
    layer.enable_adapters(call != "disabled")
    scopes = {"cached": randlora.inference_cache, "mixed": lambda: mixed_batch(layer, [layer], names)}
    opened = scopes.get(call, contextlib.nullcontext)
    for training in (True, False):
        refused = pytest.raises(ValueError, match=f"the base layer's {name} is on the meta device")
        with torch.set_grad_enabled(training), opened(), refused:
            layer(x)
