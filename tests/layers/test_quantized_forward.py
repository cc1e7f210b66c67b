"""Quantised base layers: forward, backward, the inference cache, a training run."""

import copy

import pytest
import torch
from helpers.cache_cases import call_until_kept
from helpers.common import make_bases, normal, over, randomize, reference_update
from helpers.quantized_layers import (
    DTYPES,
    allowed,
    assert_same_weight,
    bnb,
    exact_forward,
    kernels,  # noqa: F401
    make_layer,
    needs_ao,
    needs_bnb,
    over_kinds,
    over_shapes,
    parts,
    relative_error,
)  # fmt: skip
from torch import nn

import randlora
from randlora.layers import quantized


@over_kinds
@over_shapes
@over("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward_and_gradients(kind, shape, dtype, bias):
    """PEFT's forward gives fp32 for bf16 (fact 8 of its 8-bit and 4-bit layers); torchao's own gives x no gradient."""
    layer = make_layer(kind, *shape, bias=bias, dtype=dtype)
    x = normal(2, 3, shape[0], seed=6, dtype=dtype).requires_grad_()
    grad = normal(2, 3, shape[1], seed=7, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype == layer.base_layer(x.detach()).dtype
    assert relative_error(y, exact_forward(layer, x.detach())) <= allowed(kind, dtype)
    y.backward(grad)

    lam, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    weight = quantized.dequantize(layer.base_layer).double()
    bound = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    exact_x = grad.double() @ (weight + reference_update(layer))
    assert relative_error(x.grad, exact_x) <= bound and x.grad.dtype == dtype
    # dW is linear in lambda and in gamma, so that sum(lambda * dlambda) = sum(gamma * dgamma) = <G, dW>.
    G = grad.double().flatten(0, 1).t() @ x.detach().double().flatten(0, 1)
    exact = (G * reference_update(layer)).sum()
    scale = (G * reference_update(layer)).norm()
    for parameter in (lam, gamma):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert abs((parameter.grad.double() * parameter.detach().double()).sum() - exact) <= 4 * bound * scale


@over_kinds
@over_shapes
@over("dtype", DTYPES)
def test_hadamard_bases(kind, shape, dtype):
    """Of them no dense copy is made, nor a matrix of the update."""
    layer = make_layer(kind, *shape, dtype=dtype, bases=make_bases(*shape, 5, kind="hadamard"))
    x = normal(2, 3, shape[0], seed=6, dtype=dtype).requires_grad_()
    y = layer(x)
    y.float().sum().backward()
    assert layer.bases["default"].nbytes < 50
    assert relative_error(y, exact_forward(layer, x.detach())) <= allowed(kind, dtype)
    exact_x = (quantized.dequantize(layer.base_layer).double() + reference_update(layer)).sum(0).expand_as(x)
    assert relative_error(x.grad, exact_x) <= {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert layer.randlora_lambda["default"].grad.dtype == torch.float32


@over_kinds
def test_gradients_of_the_parameters_equal_those_beside_a_float_weight(kind):
    """The update does not see the base, so the two agree to the last bit."""
    layer, plain = make_layer(kind), None
    plain = randlora.Linear(nn.Linear(41, 24), r=5, randlora_alpha=0.25, bases=layer.bases["default"])
    randomize(plain).strategy = layer.strategy = "factored"
    for one in (layer, plain):
        one(normal(7, 41)).backward(normal(7, 24, seed=7))
    for name in ("randlora_lambda", "randlora_gamma"):
        torch.testing.assert_close(getattr(layer, name)["default"].grad, getattr(plain, name)["default"].grad)


@over_kinds
def test_a_second_adapter_nests_nothing(kind):
    layer = make_layer(kind)
    layer.update_layer("second", r=3, randlora_alpha=0.15, bases=make_bases(41, 24, 3))
    randomize(layer).set_adapter(["default", "second"])
    assert sum(isinstance(m, randlora.RandLoraLayer) for m in layer.modules()) == 1
    expected = exact_forward(layer, normal(7, 41), ["default", "second"])
    assert relative_error(layer(normal(7, 41)), expected) <= allowed(kind, torch.float32)


@over_kinds
def test_training_and_evaluation_alternate(kind):
    layer = make_layer(kind, 128, 64)
    before = parts(layer.base_layer)
    x = normal(3, 128)
    expected = exact_forward(layer, x)
    limit = max(allowed(kind, torch.float32), 2e-2 * (kind == "8bit"))  # evaluation quantises the input to 8 bits
    for _ in range(2):
        layer.eval()
        with torch.no_grad():
            for _ in range(3):
                assert relative_error(layer(x), expected) <= limit
        layer.train()
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        weight = quantized.dequantize(layer.base_layer).double() + reference_update(layer)
        assert relative_error(leaf.grad, weight.sum(0).expand(3, -1)) < 1e-6
    assert_same_weight(layer.base_layer, before)


@needs_ao
@pytest.mark.parametrize("kind", ["int8", "int8-dynamic", "int4"])
def test_no_float_copy_of_the_weight_is_kept(kind):
    layer = make_layer(kind, 64, 96)
    saved = []

    def pack(t):
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(normal(3, 64).requires_grad_())
    assert not [t.shape for t in saved if type(t) is torch.Tensor and t.shape in ((64, 96), (96, 64))]


@needs_ao
def test_a_trainable_bias_gets_its_gradient():
    layer = make_layer("int8-dynamic")
    layer.bias.requires_grad_(True)
    grad = normal(7, 24, seed=7)
    layer(normal(7, 41).requires_grad_()).backward(grad)
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


@over_kinds
def test_autocast(kind):
    layer = make_layer(kind)
    x = normal(3, 41)
    with torch.autocast("cpu", torch.bfloat16):
        for mode in (True, False):
            layer.train(mode)
            with torch.set_grad_enabled(mode):
                for _ in range(3):
                    y = layer(x)
                    assert y.dtype == layer.base_layer(x).dtype
                    assert relative_error(y, exact_forward(layer, x)) <= 2e-2


# ---- the inference cache ---------------------------------------------------------------------------------------------


@over_kinds
@over("dtype", DTYPES)
def test_cache_holds_the_update_alone(kind, dtype):
    x = normal(3, 41, dtype=dtype)
    layer = make_layer(kind, dtype=dtype).eval()
    layer.strategy = "merged"  # asks for W + dW, which a quantised weight cannot give
    limit = max(allowed(kind, dtype), 2e-2 * (kind == "8bit"))
    with torch.no_grad(), randlora.inference_cache() as scope:
        for _ in range(2):
            call_until_kept(scope, layer, x)
            assert relative_error(layer(x), exact_forward(layer, x)) <= limit
            assert scope.nbytes == 41 * 24 * dtype.itemsize
            (entry,) = scope._layers[layer].values()
            kept = entry.tensor.double().T  # [in, out], as it is multiplied
            torch.testing.assert_close(kept, reference_update(layer), rtol=1e-2, atol=1e-4)
            layer.randlora_lambda["default"].mul_(-3)
            assert relative_error(layer(x), exact_forward(layer, x)) <= limit
        layer.to("cpu")
        call_until_kept(scope, layer, x)
        assert relative_error(layer(x), exact_forward(layer, x)) <= limit


@over_kinds
def test_cache_counts_the_update_and_not_the_weight(kind):
    """A 4-bit weight has half as many elements."""
    layer, x = make_layer(kind).eval(), normal(3, 41)
    for limit in (41 * 24 * 4 - 1, 41 * 24 * 4):
        with torch.no_grad(), randlora.inference_cache(limit) as scope:
            for _ in range(100):
                layer(x)
            assert scope.nbytes == (limit == 41 * 24 * 4) * limit


# ---- training --------------------------------------------------------------------------------------------------------


@needs_bnb
def test_training_a_4bit_llama():
    """The losses are those of a float model with the dequantised weights, as the base products are."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    model.requires_grad_(False)
    plain = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "proj" in name:
            base = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False, quant_type="nf4")
            base.load_state_dict(module.state_dict())
            base.to("cpu")
            twin = plain.get_submodule(name)
            twin.weight.copy_(quantized.dequantize(base))
            for root, layer in ((model, base), (plain, twin)):
                root.set_submodule(name, randlora.Linear(layer, r=8, randlora_alpha=16))
    tokens = torch.randint(0, 61, (4, 17))
    losses = []
    for one in (model, plain):
        trained = [p for p in one.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=2e-2)
        losses.append([])
        for _ in range(12):
            loss = one(input_ids=tokens, labels=tokens).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    quantised, reference = losses
    assert quantised[-1] < quantised[0] - 0.5
    # Both compute in fp32 with the same numbers, so only the order of additions differs: about 1e-7 per product. Adam
    # divides by the gradient's own size, and so passes such differences on step by step; after twelve: 1e-5.
    assert quantised[0] == pytest.approx(reference[0], rel=1e-5)
    assert quantised == pytest.approx(reference, rel=1e-4)
