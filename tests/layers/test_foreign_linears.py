"""Base layers that are no ``nn.Linear`` and behave like one: GPTQ, AWQ, AQLM, EETQ and modules of somebody's own."""

import copy

import pytest
import torch
from helpers.common import make_bases, normal, randomize, reference_dW, reference_update
from helpers.foreign_linears import HALF, MAKE, QUANTISED, Plain, exact, over_foreign
from helpers.models import adapt
from torch import nn

import randlora
from randlora.layers import linears, quantized

SHAPES = [(48, 32), (32, 48)]
over_shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
over_bases = pytest.mark.parametrize("kind", ["dense", "hadamard"])


def make_layer(name, shape=SHAPES[0], kind="dense", r=5):
    bases = make_bases(*shape, r, kind=kind)
    return randomize(randlora.Linear(MAKE[name](*shape), r=r, randlora_alpha=0.05 * r, bases=bases))


def dtype_of(name):
    return torch.float16 if name in HALF else torch.float32


def assert_near(got, expected, name):
    error = (got.double() - expected).norm() / expected.norm()
    assert error <= (3e-3 if name in HALF else 2e-6), error


@over_foreign
@over_shapes
@over_bases
def test_forward_and_gradients(name, shape, kind):
    layer = make_layer(name, shape, kind)
    weight, bias = exact(layer.base_layer), getattr(layer.base_layer, "bias", None)
    bias = 0 if bias is None else bias.detach().double()
    x, g = normal(2, 3, shape[0], dtype=dtype_of(name)), normal(2, 3, shape[1], seed=7)
    leaf = x.clone().requires_grad_()
    y = layer.train()(leaf)  # AutoAWQ's layers are made in eval mode
    lam, gamma = (p["default"].detach().double().requires_grad_() for p in layer.trained_parts())
    bases = layer.bases["default"].to(torch.float64)
    factor = layer.scaling["default"]
    x64 = x.double().requires_grad_()
    expected = x64 @ (weight + reference_dW(bases.A, bases.B, lam, gamma, factor, *shape)).T + bias
    assert y.dtype == dtype_of(name) and {p["default"].dtype for p in layer.trained_parts()} == {torch.float32}
    assert_near(y, expected, name)
    expected.backward(g.double())
    if name == "real-awq":
        with pytest.raises(ValueError, match="triton or autoawq-kernels is needed"):
            y.backward(g.to(y.dtype))
        return
    y.backward(g.to(y.dtype))
    assert_near(leaf.grad, x64.grad, name)
    for part, reference in zip(layer.trained_parts(), (lam, gamma), strict=True):
        assert_near(part["default"].grad, reference.grad, name)
    with torch.no_grad(), randlora.inference_cache() as scope:
        layer.eval()
        for _ in range(50):
            z = layer(x)
        assert_near(z, expected.detach(), name)
        assert bool(scope.nbytes) == (kind == "dense")
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


@over_foreign
def test_what_a_layer_is(name):
    base = MAKE[name](48, 32)
    assert linears.sizes_of(base) == (48, 32) and linears.is_linear(base)
    assert linears.is_sure_to_be_linear(base) == (name != "plain")
    dtype, device = linears.dtype_and_device(base)
    assert device.type == "cpu" and dtype == (
        torch.float32 if name in ("plain", "aqlm", "real-aqlm") else torch.float16
    )
    layer = make_layer(name)
    assert not any(p.requires_grad for p in layer.base_layer.parameters())
    assert "48 -> 32" in randlora.explain(layer, 10) and "in_features=48" in repr(layer)


@pytest.mark.parametrize("name", QUANTISED)
def test_merging_is_refused_with_what_to_do(name):
    layer = make_layer(name)
    assert not quantized.is_quantized(layer.base_layer)
    x = normal(3, 48, dtype=dtype_of(name))
    expected = layer(x)
    with pytest.raises(
        TypeError, match=r"To merge, load the adapter onto the model as it was before its layers were quant"
    ):
        layer.merge()
    assert not layer.merged and torch.equal(layer(x), expected)


@pytest.mark.parametrize("skip_bias_add", [False, True])
def test_an_ordinary_weight_in_a_class_of_its_own_is_merged_into(skip_bias_add):
    layer = randomize(randlora.Linear(Plain(13, 7, skip_bias_add), r=3, randlora_alpha=2))
    x, weight = normal(3, 13), layer.weight.clone()
    head = (lambda y: y[0]) if skip_bias_add else (lambda y: y)
    expected = head(layer(x))
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer.weight, (weight.double() + reference_update(layer)).float())
    torch.testing.assert_close(head(layer(x)), expected, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert torch.equal(layer.weight, weight)


def test_a_layer_without_a_gradient_in_eval_mode_says_so():
    layer, x = make_layer("awq").eval(), normal(3, 48).requires_grad_()
    with pytest.raises(RuntimeError, match="Awq in eval mode, passes no gradient on to its input"):
        layer(x).sum().backward()
    layer.train()(x).sum().backward()
    assert x.grad.any()


def test_tensors_without_numbers_are_named():
    layer = make_layer("gptq")
    layer.base_layer.qweight = layer.base_layer.qweight.to("meta")
    with pytest.raises(ValueError, match="the base layer's qweight is on the meta device"):
        layer(normal(3, 48))


# ---- whole models ----


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.dtype = dtype_of(name)
        self.first, self.q_proj, self.v_proj = nn.Linear(11, 48), MAKE[name](48, 32), MAKE[name](32, 48)
        self.head = nn.Linear(48, 9)

    def forward(self, x):
        x = torch.tanh(self.q_proj(torch.tanh(self.first(x)).to(self.dtype)))
        return self.head(torch.tanh(self.v_proj(x)).float())


def net(name):
    torch.manual_seed(0)
    return Net(name)


@over_foreign
@over_bases
def test_whole_models(name, kind, tmp_path):
    """Beside ordinary layers: named or not, an adapter of their file is the same, and the base is not in it."""
    x = normal(4, 11)
    model = adapt(net(name), kind=kind, target_modules=["q_proj", "v_proj", "head"], save_projection=False)
    everything = randlora.get_peft_model(net(name), {"target_modules": "all-linear", "r": 4, "kind": kind})
    adapted = {n for n, m in everything.model.named_modules() if isinstance(m, randlora.Linear)}
    assert adapted == ({"first", "head"} if name == "plain" else {"first", "q_proj", "v_proj", "head"})
    expected = model(x)
    assert not torch.allclose(expected, net(name)(x))
    model.save_pretrained(tmp_path)
    loaded = randlora.RandLoraModel.from_pretrained(net(name), tmp_path)
    assert torch.equal(loaded(x), expected)
    state = {key for key in model.state_dict() if "randlora" in key}
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert len(list(file.keys())) == len(state) == 6
    mixed = loaded(x, adapter_names=["default", "__base__"] * 2)
    torch.testing.assert_close(mixed[::2], expected[::2], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[1::2], net(name)(x)[1::2], rtol=1e-3, atol=1e-3)
    if name != "plain":
        with pytest.raises(TypeError, match="'q_proj' cannot be merged into"):
            model.merge_adapter()
        assert not any(layer.merged for layer in (model.model.q_proj, model.model.head))
    assert torch.equal(model(x), expected)
    told = randlora.estimate(net(name), model.peft_config["default"], tokens=4, inputs=x)
    assert told
    if name != "real-awq":
        model(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    plain = model.unload()
    assert type(plain.q_proj) is type(net(name).q_proj) and torch.equal(plain(x), net(name)(x))


# ---- what is no linear layer ----


class Spline(nn.Module):
    """As the layers of Kolmogorov-Arnold networks: the two attributes, and something else computed."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(normal(out_features, in_features, 3))

    def forward(self, x):
        return torch.einsum("...i,oik->...ok", torch.sin(x), self.weight).sum(-1)


class Mlp(nn.Module):
    def __init__(self, in_features, out_features):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.fc1, self.fc2 = nn.Linear(in_features, 5), nn.Linear(5, out_features)

    def forward(self, x):
        return self.fc2(torch.tanh(self.fc1(x)))


class Untold(nn.Module):
    def __init__(self, **sizes):
        super().__init__()
        vars(self).update(sizes)


NOT_LINEAR = {
    "embedding": nn.Embedding(4, 5), "bilinear": nn.Bilinear(4, 5, 6), "conv": nn.Conv2d(4, 5, 1),
    "lstm": nn.LSTM(4, 5), "norm": nn.BatchNorm1d(4), "mlp": Mlp(4, 6),
    "words": Untold(in_features="four", out_features=5), "flag": Untold(in_features=True, out_features=5),
    "one": Untold(in_features=4), "negative": Untold(in_features=4, out_features=-1), "identity": nn.Identity(4),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_LINEAR)
def test_what_is_no_linear_layer(what):
    module = NOT_LINEAR[what]
    assert not linears.is_linear(module) and not linears.is_sure_to_be_linear(module)
    inside = ", which has linear layers inside" if what == "mlp" else ""
    with pytest.raises(TypeError, match=f"must be a linear layer: .*got {type(module).__name__}{inside}"):
        randlora.Linear(module)
    model = nn.ModuleDict({"fine": nn.Linear(4, 4), "odd": module})
    with pytest.raises(ValueError, match=r"matches 'odd', a .*, which cannot be adapted: .*in_features and"):
        randlora.get_peft_model(copy.deepcopy(model), {"target_modules": ["fine", "odd"]})
    found = randlora.get_peft_model(model, {"target_modules": "all-linear"})
    assert {n for n, m in found.model.named_modules() if isinstance(m, randlora.Linear)} == (
        {"fine", "odd.fc1", "odd.fc2"} if what == "mlp" else {"fine"}
    )
    found.unload()


def test_modules_that_may_be_linear_are_adapted_where_they_are_named():
    model = nn.Sequential(nn.Linear(4, 4), Spline(4, 6))
    model = randlora.get_peft_model(model, {"target_modules": "all-linear"})
    assert not isinstance(model.model[1], randlora.Linear)
    model.unload()
    with pytest.raises(ValueError, match="matches no layer of this model"):
        randlora.get_peft_model(nn.Sequential(nn.ReLU(), Spline(4, 6)), {"target_modules": "all-linear"})
    model = randlora.get_peft_model(nn.Sequential(nn.Linear(4, 4), Spline(4, 6)), {"target_modules": ["1"], "r": 2})
    layer, x = randomize(model.model[1]), normal(3, 4)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ reference_update(layer).float().T)


def test_sizes_that_a_layer_does_not_have_are_found_when_it_is_called():
    base = Plain(13, 7)
    base.out_features = 8
    layer = randlora.Linear(base, r=2)
    with pytest.raises(
        ValueError, match=r"Plain, must return \[\.\.\., 8\] for an input of shape \[\.\.\., 13\], got \[3, 7\]"
    ):
        layer(normal(3, 13))
