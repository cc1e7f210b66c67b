"""Base weights that are computed anew at every call: adapters act beside them, merging into them is refused."""

from collections import OrderedDict

import pytest
import torch
from helpers.common import normal, randomize, reference_update
from helpers.experts_cases import adapt, experts_of, inputs
from helpers.models import assert_unchanged, snapshot
from helpers.models import randomize as randomize_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import randlora


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class ComputedInAHook:
    """As weight_norm and prune did before parametrisations."""

    def __init__(self, module):
        module.raw = module._parameters.pop("weight")
        module.weight = module.raw * 3
        module.register_forward_pre_hook(self)

    def __call__(self, module, _):
        module.weight = module.raw * 3


# name -> (changes a linear layer, undoes it)
WAYS = {
    "weight_norm": (parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "spectral_norm": (parametrizations.spectral_norm, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "orthogonal": (parametrizations.orthogonal, lambda m: parametrize.remove_parametrizations(m, "weight")),
    "own": (
        lambda m: parametrize.register_parametrization(m, "weight", Doubled()),
        lambda m: parametrize.remove_parametrizations(m, "weight"),
    ),
    "weight_norm_by_hook": (nn.utils.weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm_by_hook": (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
    "pruned": (
        lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
        lambda m: prune.remove(m, "weight"),
    ),
    "hook": (ComputedInAHook, None),
}  # fmt: skip
over_ways = pytest.mark.parametrize("way", WAYS)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def make_base(way):
    torch.manual_seed(0)
    base = nn.Linear(8, 6).double().eval()
    WAYS[way][0](base)
    return base


def make_model(way):
    return nn.Sequential(OrderedDict(first=nn.Linear(5, 8).double(), second=make_base(way))).eval()


@over_ways
def test_adapting(way):
    base, x = make_base(way), normal(7, 8, dtype=torch.float64)
    expected = base(x).detach()
    layer = randomize(randlora.Linear(base, r=2, randlora_alpha=3)).eval()
    assert {name.split(".")[0] for name, p in layer.named_parameters() if p.requires_grad} == {
        "randlora_lambda", "randlora_gamma"
    }  # fmt: skip
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            for _ in range(3):
                y = layer(x)
                torch.testing.assert_close(y, expected + x @ reference_update(layer).T)
    y.sum().backward()


@over_ways
def test_merging_is_refused(way):
    layer = randomize(randlora.Linear(make_base(way), r=2, randlora_alpha=3)).eval()
    x = normal(7, 8, dtype=torch.float64)
    before, expected = snapshot(layer), layer(x)
    with pytest.raises(ValueError, match=r"the weight of this .*Linear is no parameter but computed anew"):
        layer.merge()
    assert_unchanged(layer, before)
    assert not layer.merged and torch.equal(layer(x), expected)
    if WAYS[way][1] is not None:
        base = layer.get_base_layer()
        WAYS[way][1](base)
        assert "weight" in base._parameters or "weight" in base._buffers  # torch makes a buffer of several frozen ones
        layer.merge()
        torch.testing.assert_close(layer(x), expected)
        layer.unmerge()
        torch.testing.assert_close(layer(x), expected)


def test_merging_into_a_tensor_of_no_state_dict_is_refused():
    layer = randomize(randlora.Linear(nn.Linear(8, 6), r=2, randlora_alpha=3)).eval()
    base, x = layer.get_base_layer(), normal(7, 8)
    expected, weight = layer(x), base._parameters.pop("weight")
    base.weight = weight.detach()
    with pytest.raises(ValueError, match="no parameter but a tensor that no state dict holds"):
        layer.merge()
    base.weight = nn.Parameter(layer.weight.detach())
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_what_is_told_to_do_makes_experts_mergeable():
    """Of them too, whose weight has another name."""
    layer = adapt(experts_of("Mixtral"))
    part, base, arguments = layer.down_proj, layer.base_layer, inputs(2)
    expected, weight = layer(*arguments), base._parameters.pop("down_proj")
    base.down_proj = weight.detach()
    with pytest.raises(ValueError, match="no parameter but a tensor that no state dict holds") as refused:
        part.merge()
    exec(str(refused.value).split(": ")[1].split(" makes it one")[0], {"layer": part, "torch": torch})
    part.merge()
    torch.testing.assert_close(layer(*arguments), expected)


@over_ways
def test_unmerging_is_refused(way):
    """What was merged before the weight came to be computed anew is part of what it is computed from."""
    torch.manual_seed(0)
    layer = randomize(randlora.Linear(nn.Linear(8, 6).double(), r=2, randlora_alpha=3)).eval()
    layer.merge()
    WAYS[way][0](layer.get_base_layer())
    x = normal(7, 8, dtype=torch.float64)
    expected = layer(x)
    with pytest.raises(ValueError, match=r"the weight of this .*Linear is no parameter but computed anew"):
        layer.unmerge()
    assert layer.merged
    torch.testing.assert_close(layer(x), expected)


@over_ways
@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_model_is_checked_before_its_first_layer(way, method):
    model = randomize_model(randlora.get_peft_model(make_model(way), {"r": 2, "target_modules": ["first", "second"]}))
    x = normal(7, 5, dtype=torch.float64)
    before, expected = snapshot(model), model(x)
    with pytest.raises(
        ValueError, match=r"'second' cannot be merged into: the weight of this .*Linear is no parameter"
    ):
        getattr(model, method)()
    assert_unchanged(model, before)
    assert torch.equal(model(x), expected) and not model.model.first.merged
    base = model.model.second.base_layer
    assert model.unload().second is base


def test_a_parametrised_bias_is_no_obstacle():
    torch.manual_seed(0)
    base = nn.Linear(8, 6).double()
    parametrize.register_parametrization(base, "bias", Doubled())
    layer, x = randomize(randlora.Linear(base, r=2, randlora_alpha=3)), normal(7, 8, dtype=torch.float64)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)


def test_a_parametrised_attention_is_refused():
    for change in (
        lambda m: parametrizations.weight_norm(m, "in_proj_weight"),
        lambda m: nn.utils.weight_norm(m, "in_proj_weight"),
        lambda m: parametrizations.weight_norm(m.out_proj),
        lambda m: prune.l1_unstructured(m.out_proj, "weight", 0.5),
    ):
        model = nn.Sequential(nn.MultiheadAttention(8, 2))
        change(model[0])
        before = snapshot(model)
        with pytest.raises((TypeError, ValueError), match="which cannot be adapted"):
            randlora.get_peft_model(model, {"r": 2, "target_modules": ["0"]})
        assert_unchanged(model, before)


# ---- layers that do something else with their weight ----


class Masked(nn.Linear):
    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        self.register_buffer("mask", (normal(*self.weight.shape) > 0).to(self.weight.dtype))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x * x.shape[-1] ** -0.5)


class Quiet(nn.Linear):
    """What a subclass does beside the product is its own matter."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def hooked(hook, before=False):
    base = nn.Linear(8, 6)
    (base.register_forward_pre_hook if before else base.register_forward_hook)(hook)
    return base


OTHERS = {
    "masked": (lambda: Masked(8, 6), True),
    "scaled": (lambda: Scaled(8, 6), True),
    "hook": (lambda: hooked(lambda module, args, y: 3 * y), True),
    "pre-hook": (lambda: hooked(lambda module, args: (args[0] * 2,), before=True), True),
    "replaced forward": (lambda: replaced(), True),
    "subclass": (lambda: Quiet(8, 6), False),
    "watching hook": (lambda: hooked(lambda module, args, y: None), False),
    "rounding": (lambda: hooked(lambda module, args, y: y.bfloat16().to(y.dtype)), False),
}


def replaced():
    base = nn.Linear(8, 6)
    base.forward = lambda x: torch.relu(nn.functional.linear(x, base.weight, base.bias))
    return base


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_layers_that_do_more(name, dtype):
    make, refused = OTHERS[name]
    torch.manual_seed(0)
    base = make().to(dtype)
    layer = randomize(randlora.Linear(base, r=2, randlora_alpha=3))
    x, state = normal(7, 8, dtype=dtype), torch.get_rng_state()
    expected, before = layer(x), snapshot(layer)
    if refused:
        with pytest.raises(ValueError, match="multiply by its weight: adding to its weight does not add as much"):
            layer.merge()
        assert_unchanged(layer, before)
        assert torch.equal(layer(x), expected)
    else:
        layer.merge()
        error = (layer(x) - expected).norm() / expected.norm()
        assert error < (1e-2 if dtype == torch.bfloat16 or name == "rounding" else 1e-12)
    assert torch.equal(torch.get_rng_state(), state) and base.training
