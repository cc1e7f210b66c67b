"""What a layer returns is an ordinary tensor: in-place operations may touch it, in training and after inference."""

import pytest
import torch
import torch.nn.functional as F
from helpers.attention_cases import adapt as adapt_attention
from helpers.attention_cases import make_base as make_attention
from helpers.common import STRATEGIES, make_layer, normal, on_devices, over, randomize
from helpers.layer_op import draw_layer
from helpers.models import IDS, net
from helpers.models import adapt as adapt_model
from helpers.quantized_layers import kernels, over_kinds  # noqa: F401
from helpers.quantized_layers import make_layer as make_quantized_layer
from helpers.ternary import ALL_FORMS, draw
from torch import nn

import randlora
from randlora.functional import linear

IN_PLACE = {
    "relu": lambda y: F.relu(y, inplace=True),
    "divide": lambda y: y.div_(3.0),
    "a part": lambda y: y[..., :1].mul_(2.0),
}


def assert_ordinary(function, inputs, of_torch=False):
    """In-place operations on ``function()`` give the gradients that they give on a copy of it.

    `of_torch`: torch.nn.functional.linear has a part in it, whose results are views that in-place operations may touch.
    """
    assert of_torch or not function()._is_view()
    for name, change in IN_PLACE.items():
        results = []
        for y in (function(), function().clone()):
            change(y)
            results.append((y, *torch.autograd.grad(y.float().pow(2).sum(), inputs)))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected), name
            assert of_torch or not got._is_view(), name


AUTO_AND_ALL = ("auto", *STRATEGIES)
strategies = pytest.mark.parametrize("strategy", AUTO_AND_ALL)
leading_shapes = pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 3), (2, 0), (2, 1, 3)], ids=str)


@on_devices
@leading_shapes
@pytest.mark.parametrize("shape", [(24, 41, 5), (41, 24, 5)], ids=str)
@pytest.mark.parametrize(
    "strategy, parts",
    [(name, parts) for name in AUTO_AND_ALL for parts in ("weight and bias", "weight")]
    + [(name, "neither") for name in AUTO_AND_ALL if name != "merged"],
)
def test_dense(strategy, leading, shape, parts, device):
    _, weight, bias, *factors = draw_layer(shape, device=device)
    weight = None if parts == "neither" else weight
    bias = bias if parts == "weight and bias" else None
    x = normal(*leading, shape[0], dtype=torch.float64, device=device).requires_grad_()
    inputs = [t for t in (x, bias, *factors[2:]) if t is not None]
    out = shape[1] if weight is None else None
    assert_ordinary(lambda: linear(x, weight, bias, *factors, 0.7, strategy=strategy, out_features=out), inputs)


@on_devices
@strategies
@pytest.mark.parametrize("form", ALL_FORMS)
@pytest.mark.parametrize("shape", [(24, 41, 5), (41, 24, 5)], ids=str)
def test_ternary(strategy, form, shape, device):
    given, weight, bias, lam, gamma, bases = draw(shape, form, device=device)
    pattern, scale = bases.pattern(24, given.device)
    for x in (given[0, 0], given[0], given):
        x = x.detach().requires_grad_()
        for w, b in ((weight, bias), (None, None)):
            if w is None and strategy == "merged":
                continue
            assert_ordinary(
                lambda x=x, w=w, b=b: linear(
                    x, w, b, None, None, lam, gamma, scale, strategy=strategy, pattern=pattern, out_features=shape[1]
                ),
                (x, lam, gamma),
            )


@on_devices
@over("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_dtypes(dtype, autocast, device):
    layer = make_layer(24, 41, dtype=dtype, device=device)
    x = normal(2, 3, 24, dtype=dtype, device=device).requires_grad_()
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def function():
        with torch.autocast(device, autocast, enabled=autocast is not None):
            return layer(x)

    assert_ordinary(function, (x, *parameters))


@on_devices
@pytest.mark.parametrize("weight_is_transposed", [False, True])
def test_dropout_and_a_trainable_weight(weight_is_transposed, device):
    x, weight, bias, *factors = draw_layer((24, 41, 5), device=device)
    weight = (weight.t().contiguous() if weight_is_transposed else weight).requires_grad_()
    seed = torch.tensor([5], device=device)
    for w in (weight.detach(), weight):
        assert_ordinary(
            lambda w=w: linear(x, w, bias, *factors, 0.7, 0.3, seed=seed, weight_is_transposed=weight_is_transposed),
            (x, *factors[2:], *([w] if w.requires_grad else [])),
            of_torch=w.requires_grad,
        )


def test_several_adapters_and_disabled_ones():
    layer = make_layer(24, 41)
    layer.update_layer("second", r=3, randlora_alpha=3)
    randomize(layer)
    x = normal(2, 3, 24).requires_grad_()
    for names in (["default", "second"], []):
        layer.set_adapter(names)
        assert_ordinary(lambda: layer(x), [x], of_torch=not names)


def test_mixed_batches():
    model = adapt_model(net())
    layer = next(m for m in model.modules() if isinstance(m, randlora.Linear))
    found = []
    for change in (lambda y: y.mul_(2), lambda y: y * 2):
        hook = layer.register_forward_hook(lambda module, args, y, change=change: change(y))
        model(IDS, adapter_names=["default", "__base__"] * 2).sum().backward()
        hook.remove()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert found[0] and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dims", [2, 3])
def test_attention(dims):
    attention = adapt_attention(make_attention(batch_first=True))
    x = normal(2, 5, 24, dtype=torch.float64)[0 if dims == 2 else slice(None)].clone().requires_grad_()
    parameters = [p for p in attention.parameters() if p.requires_grad]
    for need_weights in (True, False):
        results = []
        for copied in (False, True):
            y, _ = attention(x, x, x, need_weights=need_weights)
            y = F.relu(y.clone() if copied else y, inplace=True)
            results.append(torch.autograd.grad(y.pow(2).sum(), (x, *parameters)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@over_kinds
def test_quantized_layers(kind):
    layer = make_quantized_layer(kind, 24, 41)
    x = normal(3, 24).requires_grad_()
    parameters = [p for p in layer.parameters() if p.requires_grad]
    assert_ordinary(lambda: layer(x), (x, *parameters))
    if not kind.startswith(("8bit", "nf4", "fp4")):  # bitsandbytes' own results are views
        layer.enable_adapters(False)
        assert_ordinary(lambda: layer(x), [x])


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)], ids=str)
def test_cached_updates(leading):
    """Results of inference are no views that were made under no_grad, which could not be trained on in place."""
    layer = make_layer(24, 41, dtype=torch.bfloat16, bias=False).eval()
    x, head = normal(*leading, 24, dtype=torch.bfloat16), torch.ones(41, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(4):
        with torch.no_grad():
            y = layer(x)
        y.mul_(head).sum().backward()
        assert head.grad is not None


def test_functions_of_parameters():
    """The scaled base and updates as matrices."""
    _, _, _, A, B, lam, gamma = draw_layer((24, 41, 5))
    A = A[:, :, :24]
    assert_ordinary(lambda: randlora.UniqueBaseGrad.apply(A, lam, gamma), (lam, gamma))
    assert_ordinary(lambda: randlora.functional.unique_base(A, lam, gamma), (lam, gamma))
    for i, o in ((24, 41), (41, 24)):
        assert_ordinary(lambda i=i, o=o: randlora.functional.delta_weight(A, B, lam, gamma, 0.7, i, o), (lam, gamma))


@pytest.mark.parametrize("form", [form for form in ALL_FORMS if form != "seed"])
def test_update_of_packed_bases(form):
    build = torch.ops.randlora.hadamard_update if form == "hadamard" else torch.ops.randlora.sparse_update
    for weight in (None, normal(24, 41), normal(41, 24).t()):
        _, _, _, lam, gamma, bases = draw((24, 41, 5), form, dtype=torch.float32)
        pattern = list(bases.pattern(24)[0])

        def function(pattern=pattern, lam=lam, gamma=gamma, weight=weight):
            return build(pattern, lam, gamma, 41, 0.7, weight, torch.float32)

        assert_ordinary(function, (lam, gamma))


@strategies
def test_gradients_that_are_differentiated_again(strategy):
    x, weight, bias, *factors = draw_layer((24, 41, 5))
    y = linear(x, weight, bias, *factors, 0.7, strategy=strategy)
    for gradient in torch.autograd.grad(y.sum(), (x, *factors[2:]), create_graph=True):
        assert not gradient._is_view()


def test_model_with_in_place_activations():
    """Gradients of a whole network are those of the one without in-place operations."""
    found = []
    for inplace in (True, False):
        layers = (make_layer(24, 41), nn.ReLU(inplace), make_layer(41, 7), nn.SiLU(inplace), nn.Dropout(0.0, inplace))
        model = nn.Sequential(*layers)
        model(normal(3, 24)).sum().backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_deberta_is_trained():
    transformers = pytest.importorskip("transformers")
    settings = transformers.DebertaConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        max_position_embeddings=16, relative_attention=True, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.DebertaForSequenceClassification(settings)
    config = randlora.RandLoraConfig(r=4, target_modules="all-linear")
    model = randlora.get_peft_model(model, config)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    for _ in range(2):
        model(input_ids=torch.arange(12).view(2, 6), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = [p for p in model.parameters() if p.requires_grad]
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
