"""Base layers that are not quite an ``nn.Linear``: of a class of someone's own."""

import pytest
import torch
from helpers.common import make_base, make_bases, normal, randomize, reference_update
from helpers.unusual_linears import ON_CPU, Doubled, Plain, Scaled, WithBias, both_ways, make, update, wrap
from torch import nn

import randlora


class Squared(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight**2, self.bias)


class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.5, self.training))


# ---- further arguments ----


@pytest.mark.parametrize("sizes", [(12, 7), (7, 12)])
def test_further_arguments_reach_the_base_layer(sizes):
    layer, x = wrap(make(Scaled, *sizes)), normal(2, 3, sizes[0])
    calls = [((), {}), ((0.5,), {}), ((), {"scale": 3.0}), ((2.0,), {"shift": 1.0})]
    for _ in both_ways(layer):
        for args, kwargs in calls:
            expected = layer.base_layer(x, *args, **kwargs) + update(layer, x)
            torch.testing.assert_close(layer(x, *args, **kwargs), expected, rtol=1e-4, atol=1e-4)
    layer.enable_adapters(False)
    assert torch.equal(layer(x, 0.5, shift=1.0), layer.base_layer(x, 0.5, shift=1.0))
    layer.enable_adapters(True)
    layer.merge()
    assert torch.equal(layer(x, 0.5), layer.base_layer(x, 0.5))
    layer.unmerge()


def test_gradients_with_further_arguments():
    layer, x = wrap(make(Scaled)), normal(3, 12).requires_grad_()
    layer(x, scale=0.5).sum().backward()
    expected = (0.5 * layer.weight + reference_update(layer).float()).sum(0).expand(3, -1)
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
    assert layer.randlora_lambda["default"].grad.any()


def test_the_input_by_its_name():
    x = normal(3, 12)
    scaled, plain, own = wrap(make(Scaled)), wrap(make_base(12, 7)), wrap(make(Plain))
    assert torch.equal(scaled(hidden_states=x, scale=0.5), scaled(x, 0.5))
    assert torch.equal(plain(input=x), plain(x)) and torch.equal(own(x=x), own(x))
    for layer, name in ((scaled, "input"), (plain, "hidden_states")):
        with pytest.raises(TypeError, match=rf"must be called with its input, got \['{name}'\]"):
            layer(**{name: x})
    with pytest.raises(TypeError, match="must be called with its input"):
        plain()
    with pytest.raises(TypeError, match="positional arguments"):
        plain(x, 0.5)


def test_a_mixed_batch_with_further_arguments():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make(Scaled)

        def forward(self, x):
            return self.layer(x, scale=0.5)

    model = randlora.get_peft_model(Net(), {"target_modules": ["layer"], **ON_CPU})
    randomize(model.model.layer)
    x = normal(2, 5, 12)
    got = model(x, adapter_names=["__base__", "default"])
    base = model.model.layer.base_layer(x, scale=0.5)
    torch.testing.assert_close(got[0], base[0])
    torch.testing.assert_close(got[1], base[1] + update(model.model.layer, x)[1], rtol=1e-4, atol=1e-4)


# ---- tuples ----


@pytest.mark.parametrize("kind", ["dense", "hadamard"])
@pytest.mark.parametrize("sizes", [(12, 7), (7, 12)])
def test_the_update_is_added_to_the_head_of_a_tuple(sizes, kind):
    """Megatron's layers give their bias beside the product, for a later kernel to add."""
    layer = wrap(make(WithBias, *sizes), bases=make_bases(*sizes, 4, kind=kind))
    x = normal(2, 5, sizes[0])
    for _ in both_ways(layer):
        y, bias = layer(x)
        torch.testing.assert_close(y, layer.base_layer(x)[0] + update(layer, x), rtol=1e-4, atol=1e-4)
        assert bias is layer.base_layer.bias
    layer.enable_adapters(False)
    assert torch.equal(layer(x)[0], layer.base_layer(x)[0])
    layer.enable_adapters(True)
    leaf = x.clone().requires_grad_()
    layer.train()(leaf)[0].sum().backward()
    expected = (layer.weight + reference_update(layer).float()).sum(0).expand_as(x)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-4, atol=1e-4)
    layer.merge()
    torch.testing.assert_close(layer(x)[0], y, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer.weight, make(WithBias, *sizes).weight)


def test_tuples_inside_the_cache_and_in_a_mixed_batch():
    layer, x = wrap(make(WithBias)).eval(), normal(3, 12)
    expected = layer(x)[0]
    with torch.no_grad(), randlora.inference_cache() as scope:
        while not scope.nbytes:
            layer(x)
        torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)
        assert layer(x)[1] is layer.bias

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make(WithBias)

        def forward(self, x):
            y, bias = self.layer(x)
            return y + bias

    model = randlora.get_peft_model(Net(), {"target_modules": ["layer"], **ON_CPU})
    randomize(model.model.layer)
    got = model(x, adapter_names=["__base__", "default", "__base__"])
    torch.testing.assert_close(got[1], model(x)[1])
    with model.disable_adapter():
        torch.testing.assert_close(got[::2], model(x)[::2])


# ---- outputs that nothing can be added to ----


@pytest.mark.parametrize("returned, got", [([1], "list of int"), ((), "tuple of "), ((1, 2), "tuple of int, int")])
def test_outputs_that_are_no_tensors_are_named(returned, got):
    class Odd(nn.Linear):
        def forward(self, x):
            return returned

    layer, x = wrap(make(Odd)), normal(3, 12)
    for _ in both_ways(layer):
        with pytest.raises(
            TypeError, match=rf"Odd, must return a tensor .* or a tuple that begins with one, got a {got}"
        ):
            layer(x)
    layer.enable_adapters(False)
    assert layer(x) == returned


@pytest.mark.parametrize("shape", [(1,), (3, 1), (1, 7), (7,), (3, 14), (2, 3, 7)])
def test_outputs_of_other_shapes_are_not_broadcast(shape):
    class Reshaped(nn.Linear):
        def forward(self, x):
            return torch.zeros(shape)

    layer = wrap(make(Reshaped))
    for _ in both_ways(layer):
        with pytest.raises(
            ValueError, match=r"Reshaped, must return \[\.\.\., 7\] for an input of shape \[\.\.\., 12\]"
        ):
            layer(normal(3, 12))


# ---- merging into a layer with a forward of its own ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [Plain, Scaled, Noisy])
def test_what_multiplies_by_its_weight_is_merged_into(cls, dtype):
    layer, x = wrap(make(cls, dtype=dtype)).eval(), normal(3, 12, dtype=dtype)
    expected = layer(x)
    state = torch.get_rng_state()
    layer.merge()
    assert torch.equal(torch.get_rng_state(), state)
    tolerance = {"rtol": 0.05, "atol": 0.1} if dtype.itemsize == 2 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(layer(x), expected, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", [Doubled, Squared])
def test_what_does_not_is_not_merged_into(cls, dtype):
    layer, x = wrap(make(cls, dtype=dtype)), normal(3, 12, dtype=dtype)
    expected, weight = layer(x), layer.weight.clone()
    for safe in (True, False):
        with pytest.raises(
            ValueError, match=f"{cls.__name__} with a forward of its own, does more than multiply by its weight: adding"
        ):
            layer.merge(safe_merge=safe)
    assert not layer.merged and torch.equal(layer.weight, weight) and torch.equal(layer(x), expected)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("cls", [Doubled, Squared, Plain, nn.Linear])
@pytest.mark.parametrize("hook", [None, lambda module, args, y: 3 * y])
def test_accelerates_hooks_hide_nothing(cls, hook, offload):
    accelerate = pytest.importorskip("accelerate")
    base = make(cls)
    if hook is not None:
        base.register_forward_hook(hook)
    if offload:
        accelerate.cpu_offload(base, torch.device("cpu"))
    else:
        accelerate.hooks.add_hook_to_module(base, accelerate.hooks.AlignDevicesHook("cpu"))
    layer, x = wrap(base), normal(3, 12)
    expected = layer(x)
    if cls in (Doubled, Squared) or hook is not None:
        with pytest.raises(ValueError, match="multiply by its weight: adding to its weight does not"):
            layer.merge()
        assert not layer.merged and torch.equal(layer(x), expected)
    else:
        layer.merge()
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_merging_changes_no_layer_where_one_cannot_be_merged_into():
    model = nn.Sequential(make_base(12, 7), make(Doubled, 7, 12))
    model = randlora.get_peft_model(model, {"target_modules": ["0", "1"], **ON_CPU})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"'1' cannot be merged into: the base layer, a .*Doubled"):
            call()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert type(model.unload()[1]) is Doubled


def test_a_forward_that_cannot_be_tried_is_not_merged_into():
    class Needs(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * scale

    layer = wrap(make(Needs))
    layer(normal(3, 12), 1.0)
    with pytest.raises(ValueError, match=r"how it uses its weight cannot be found out \(TypeError"):
        layer.merge()


# ---- layers that are refused when adapting ----


def test_layers_without_a_size():
    for call in (
        lambda: randlora.Linear(nn.LazyLinear(7)),
        lambda: randlora.get_peft_model(nn.Sequential(nn.LazyLinear(7)), {"target_modules": ["0"]}),
    ):
        with pytest.raises(ValueError, match="has no size yet"):
            call()
    lazy = nn.LazyLinear(7)
    lazy(normal(3, 12))
    assert wrap(lazy)(normal(3, 12)).shape == (3, 7)


@pytest.mark.parametrize("attribute", ["in_features", "out_features"])
def test_attributes_that_the_weight_contradicts(attribute):
    base = make_base(12, 7)
    setattr(base, attribute, 9)
    flag = base.weight.requires_grad
    for call in (
        lambda: randlora.Linear(base, r=4),
        lambda: randlora.get_peft_model(nn.Sequential(base), {"r": 4, "target_modules": ["0"]}),
    ):
        with pytest.raises(ValueError, match=r"its weight must have shape .*, got \[7, 12\]"):
            call()
    assert base.weight.requires_grad == flag
    pruned = make_base(12, 7)
    pruned.weight = nn.Parameter(pruned.weight[:5])
    with pytest.raises(ValueError, match=r"its weight must have shape \[7, 12\], got \[5, 12\]"):
        randlora.Linear(pruned, r=4)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floats(dtype):
    base = make_base(12, 7)
    base.weight = nn.Parameter(base.weight.to(dtype), requires_grad=False)
    for call in (
        lambda: randlora.Linear(base, r=4),
        lambda: randlora.get_peft_model(nn.Sequential(base), {"r": 4, "target_modules": ["0"]}),
    ):
        with pytest.raises(TypeError, match=f"must be of a floating dtype, got {dtype}"):
            call()


def test_integers_behind_a_forward_of_its_own():
    class Rounded(nn.Linear):
        def forward(self, x):
            return nn.functional.linear(x, self.weight.float() / 16, self.bias)

    base = make(Rounded)
    base.weight = nn.Parameter((base.weight * 16).round().to(torch.int8), requires_grad=False)
    layer, x = wrap(base), normal(3, 12)
    assert layer.randlora_lambda["default"].dtype == torch.float32
    for _ in both_ways(layer):
        torch.testing.assert_close(layer(x), base(x) + update(layer, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"the base weight's dtype must be one of .*, got torch.int8"):
        layer.merge()
    assert not layer.merged


def test_a_parametrised_layer_computes_with_its_weight_as_it_is():
    base = nn.utils.parametrizations.weight_norm(make_base(12, 7))
    layer, x = wrap(base), normal(3, 12)
    for _ in both_ways(layer):
        torch.testing.assert_close(layer(x), base(x) + update(layer, x), rtol=1e-4, atol=1e-4)
