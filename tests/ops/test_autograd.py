"""The layer op's node of autograd: what it saves and guards, which gradients it computes, and what it refuses."""

import pytest
import torch
from helpers.common import make_bases, normal, on_devices
from helpers.layer_op import ALL_GRADIENTS, draw_layer, gradients, op_options, reference
from helpers.ternary import FORMS, draw
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import randlora
from randlora.functional import delta_weight, linear, sparse_delta_weight, unique_base

SHAPE = (24, 41, 8)


def call(x, weight, bias, A, B, lam, gamma, **options):
    return linear(x, weight, bias, A, B, lam, gamma, 0.7, **options)


def raw(x, weight, bias, A, B, lam, gamma, strategy="factored", backward_strategy=None):
    options = {**op_options(x.dtype, strategy), "out_features": weight.shape[0], "backward_strategy": backward_strategy}
    return torch.ops.randlora.linear(x, weight, bias, A, B, lam, gamma, [], None, **options)


def test_it_is_a_node_of_c():
    """Python has no part in the backward."""
    y = call(*draw_layer(SHAPE))
    assert not isinstance(y.grad_fn, torch.autograd.function.BackwardCFunction)


@pytest.mark.parametrize("changed", ["x", "weight", "A", "B", "lambda", "gamma"])
def test_writing_to_what_is_saved_is_noticed(changed):
    tensors = draw_layer(SHAPE)
    y = call(*tensors)
    names = "x", "weight", "bias", "A", "B", "lambda", "gamma"
    with torch.no_grad():
        dict(zip(names, tensors, strict=True))[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_bias_is_not_saved():
    tensors = draw_layer(SHAPE)
    y = call(*tensors)
    with torch.no_grad():
        tensors[2].add_(1)
    y.sum().backward()


def test_backward_twice():
    x, *others = draw_layer(SHAPE)
    y = call(x, *others)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.sum().backward()


@pytest.mark.parametrize("form", FORMS)
def test_hooks_get_what_is_saved(form):
    """Everything, ternary bases too, goes through hooks that offload it, and comes back from them."""
    x, weight, bias, lam, gamma, bases = draw((5, 7, 3), form, tokens=1)
    pattern, scale = bases.pattern(5)

    def run():
        y = linear(x, weight, bias, None, None, lam, gamma, scale, pattern=pattern)
        return gradients(y, (x, lam, gamma))

    expected, packed = run(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.numpy(force=True), torch.from_numpy):
        found = run()
    assert {t.data_ptr() for t in (x, weight, lam, gamma, *pattern)} == {t.data_ptr() for t in packed}
    for got, exact in zip(found, expected, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    x, weight, bias, *factors = draw_layer(SHAPE)
    inputs = x, bias, *factors[2:]

    def run(function):
        y = function(x, weight, bias, *factors)
        y.backward(normal(*y.shape, seed=9, dtype=y.dtype))
        found = [t.grad for t in inputs]
        for t in inputs:
            t.grad = None
        return found

    plain, again = run(call), run(lambda *a: checkpoint(call, *a, use_reentrant=reentrant))
    for got, expected in zip(again, plain, strict=True):
        assert torch.equal(got, expected)


def test_only_what_is_asked_for_is_computed():
    """Of one call of backward, not of all that might be asked for."""
    x, *others = draw_layer(SHAPE)
    y = call(x, *others)
    with torch.profiler.profile() as profile:
        torch.autograd.grad(y.sum(), x)
    assert "randlora::unique_base_backward" not in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("ways", [("materialized", "factored"), ("merged<3,factored", "factored<3,merged")], ids=str)
def test_backward_has_its_own_strategy(ways):
    x, weight, bias, *factors = draw_layer(SHAPE)
    y = raw(x, weight, bias, *factors, *ways)
    exact = reference(x, weight, bias, *factors, 0.7)
    torch.testing.assert_close(y, exact, rtol=1e-10, atol=1e-10)
    inputs = x, bias, *factors[2:]
    with torch.profiler.profile() as profile:
        found = gradients(y, inputs)
    for got, expected in zip(found, gradients(exact, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert "randlora::linear" not in {event.key for event in profile.key_averages()}


@on_devices
def test_opcheck_with_gradients(device):
    tensors = draw_layer(SHAPE, torch.float32, device=device)
    options = op_options(torch.float32, "factored")
    op, backward = torch.ops.randlora.linear.default, torch.ops.randlora.linear_backward.default
    for more in ({}, {"backward_strategy": "materialized"}):
        torch.library.opcheck(op, (*tensors, [], None), {**options, "out_features": 41, **more})
    x, weight, _, *factors = tensors
    g = normal(2, 5, 41, dtype=x.dtype, device=device).requires_grad_()
    torch.library.opcheck(backward, (g, x, weight, *factors, [], None), {**options, **ALL_GRADIENTS})


def test_a_trainable_weight_is_refused():
    x, weight, *others = draw_layer(SHAPE)
    weight.requires_grad_()
    with pytest.raises(ValueError, match="the base weight is trainable"):
        raw(x, weight, *others)
    with torch.no_grad():
        assert not raw(x, weight, *others).requires_grad


@pytest.mark.parametrize("which", [0, 1, 2, 5, 6], ids=["x", "weight", "bias", "lambda", "gamma"])
@pytest.mark.parametrize("recording", [True, False])
def test_the_op_itself_refuses_forward_mode(which, recording):
    """It would answer without a tangent, as if nothing moved."""
    tensors = [t.detach() for t in draw_layer(SHAPE)]
    with forward_ad.dual_level(), torch.set_grad_enabled(recording):
        tensors[which] = forward_ad.make_dual(tensors[which], torch.ones_like(tensors[which]))
        with pytest.raises(NotImplementedError, match=r"forward-mode AD: call randlora\.functional\.linear"):
            raw(*tensors)


def tangent_of_backward(y, wanted, recording):
    """Of a gradient, where the gradient of `y` moves and nothing else does; the forward knew nothing of it."""
    with forward_ad.dual_level():
        grad = forward_ad.make_dual(torch.ones_like(y), torch.full_like(y, 0.5))
        (found,) = torch.autograd.grad(y, [wanted], grad, create_graph=recording)
        return forward_ad.unpack_dual(found)


@pytest.mark.parametrize("recording", [True, False])
@pytest.mark.parametrize("what", ["layer", "hadamard", "very_sparse"])
def test_a_backward_alone_in_forward_mode_is_refused(what, recording):
    """It would answer without a tangent, as if the gradient did not move."""
    x, weight, bias, A, B, lam, gamma = draw_layer(SHAPE)
    if what == "layer":
        y = call(x, weight, bias, A, B, lam, gamma)
    else:
        sizes = SHAPE[:2]
        pattern, scale = make_bases(*sizes, lam.shape[0], kind=what).pattern(min(sizes))
        y = sparse_delta_weight(pattern, scale, lam, gamma, 1.0, *sizes)
    with pytest.raises(NotImplementedError, match="called inside of"):
        tangent_of_backward(y, gamma, recording)


@pytest.mark.parametrize("recording", [True, False])
def test_a_backward_alone_in_forward_mode_of_the_scaled_base(recording):
    _, _, _, A, _, lam, gamma = draw_layer(SHAPE)
    found = tangent_of_backward(unique_base(A[:, :, : min(SHAPE[:2])], lam, gamma), gamma, recording)
    torch.testing.assert_close(found.tangent, found.primal.detach() / 2)


def test_a_second_backward_alone_in_forward_mode_of_the_scaled_base():
    _, _, _, A, _, lam, gamma = draw_layer(SHAPE)
    S = unique_base(A[:, :, : min(SHAPE[:2])], lam, gamma)
    (first,) = torch.autograd.grad(S.sum(), [gamma], create_graph=True)
    found = tangent_of_backward(first, lam, recording=False)
    torch.testing.assert_close(found.tangent, found.primal / 2)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager")()


@pytest.mark.parametrize("function", ["layer", "unique_base", "delta_weight"])
def test_forward_mode_inside_torch_compile(function):
    """Which would leave tangents out, as if nothing moved."""
    x, weight, bias, A, B, lam, gamma = (t.detach() for t in draw_layer(SHAPE))

    def of_lambda(lam):
        if function == "layer":
            return call(x, weight, bias, A, B, lam, gamma).pow(2)
        if function == "unique_base":
            return unique_base(A[:, :, :24], lam, gamma)
        return delta_weight(A, B, lam, gamma, 0.7, 24, 41)

    direction = normal(*lam.shape, seed=21, dtype=lam.dtype)
    expected = jvp(of_lambda, (lam,), (direction,))
    got = compiled(lambda: jvp(of_lambda, (lam,), (direction,)))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transform", [grad, vmap])
def test_transforms_inside_torch_compile(transform):
    x, *others = (t.detach() for t in draw_layer(SHAPE))

    def loss(x):
        return call(x, *others).pow(2).sum()

    torch.testing.assert_close(compiled(lambda: transform(loss)(x)), transform(loss)(x), rtol=1e-10, atol=1e-10)


def test_compiled_autograd():
    torch._dynamo.reset()
    layer = randlora.Linear(torch.nn.Linear(24, 41), r=8, randlora_dropout=0.0, init_weights=False)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x = normal(3, 24)
    layer(x).pow(2).sum().backward()
    expected = [p.grad.clone() for p in parameters]
    layer.zero_grad()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", fullgraph=True)):
        layer(x).pow(2).sum().backward()
        layer.train()
        layer.randlora_dropout["default"] = torch.nn.Dropout(0.5)  # a seed is kept in another way
        assert torch.autograd.grad(layer(x).sum(), parameters)[0].isfinite().all()
    for p, exact in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, exact)
