"""Forward-mode AD and second derivatives of the ops, against autograd through the two lines of the mathematics."""

import itertools

import pytest
import torch
from helpers.common import draw_factors, make_layer, normal, on_devices
from helpers.layer_op import draw_layer, mask_of, reference
from helpers.ternary import ALL_FORMS, draw
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp

import randlora
from randlora.functional import delta_weight, linear, sparse_delta_weight, unique_base

SHAPES = [(5, 7, 2), (7, 5, 2)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
strategies = pytest.mark.parametrize("strategy", ["auto", "factored", "materialized", "merged"])
DIFFERENTIABLE = (0, 1, 2, 3, 4)  # x, weight, bias, lambda, gamma


def ours_and_reference(shape, device="cpu", transposed=False, p=0.0, **options):
    """Two functions of x, weight, bias, lambda and gamma, and a point."""
    x, weight, bias, A, B, lam, gamma = (t.detach() for t in draw_layer(shape, tokens=2, device=device))
    seed = torch.tensor([3], device=device)
    mask = mask_of(x, seed, p) if p else 1.0

    def ours(x, weight, bias, lam, gamma):
        weight = weight.t() if transposed else weight
        return linear(
            x, weight, bias, A, B, lam, gamma, 0.7, p, seed=seed, weight_is_transposed=transposed, **options
        )  # fmt: skip

    def plain(x, weight, bias, lam, gamma):
        return reference(x, weight, bias, A, B, lam, gamma, 0.7, mask)

    return ours, plain, (x, weight, bias, lam, gamma)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@on_devices
@shapes
@strategies
def test_jvp_in_every_argument(shape, strategy, device):
    ours, plain, point = ours_and_reference(shape, device, strategy=strategy)
    directions = tuple(normal(*t.shape, seed=20 + i, dtype=t.dtype, device=device) for i, t in enumerate(point))
    for chosen in itertools.chain.from_iterable(itertools.combinations(DIFFERENTIABLE, k) for k in (1, 2, 5)):

        def of_chosen(function, chosen=chosen):
            def call(*given):
                return function(*(given[chosen.index(i)] if i in chosen else t for i, t in enumerate(point)))

            return jvp(call, tuple(point[i] for i in chosen), tuple(directions[i] for i in chosen))

        assert_close(of_chosen(ours), of_chosen(plain))


@shapes
@pytest.mark.parametrize("options", [{"transposed": True}, {"p": 0.4}, {"workspace": 1}], ids=str)
def test_jvp_with_options(shape, options):
    ours, plain, point = ours_and_reference(shape, **options)
    directions = tuple(normal(*t.shape, seed=20 + i, dtype=t.dtype) for i, t in enumerate(point))
    assert_close(jvp(ours, point, directions), jvp(plain, point, directions))


@shapes
@strategies
def test_second_derivatives(shape, strategy):
    """Forward over reverse, reverse over forward, reverse over reverse; in all pairs of arguments."""
    ours, plain, point = ours_and_reference(shape, strategy=strategy)

    def loss(function):
        return lambda *arguments: function(*arguments).pow(3).sum()

    chosen = (0, 2, 3, 4)
    expected = jacrev(jacrev(loss(plain), chosen), chosen)(*point)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacrev, jacfwd)):
        assert_close(outer(inner(loss(ours), chosen), chosen)(*point), expected)
    assert_close(hessian(loss(ours), (3, 4))(*point), hessian(loss(plain), (3, 4))(*point))


@on_devices
@shapes
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_checked_against_finite_differences(shape, p, device):
    ours, _, (x, weight, bias, lam, gamma) = ours_and_reference(shape, device, p=p)
    point = tuple(t.clone().requires_grad_() for t in (x, bias, lam, gamma))

    def function(x, bias, lam, gamma):
        return ours(x, weight, bias, lam, gamma)

    assert gradcheck(function, point, check_forward_ad=True)
    assert gradgradcheck(function, point, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("form", ALL_FORMS)
@shapes
def test_ternary_bases(form, shape):
    x, weight, bias, lam, gamma, bases = draw((*shape[:2], 3), form, tokens=1)
    pattern, scale = bases.pattern(5)

    def function(x, lam, gamma):
        return linear(x, weight, bias, None, None, lam, gamma, 0.7 * scale, pattern=pattern)

    assert gradcheck(function, (x, lam, gamma), check_forward_ad=True)
    assert gradgradcheck(function, (x, lam, gamma), check_fwd_over_rev=True)


@pytest.mark.parametrize("function", [randlora.UniqueBaseGrad.apply, lambda *a: unique_base(*a, scale=0.7)])
def test_unique_base(function):
    A, lam, gamma = draw_factors(3, 2, 5, torch.float64)
    point = lam.requires_grad_(), gamma.requires_grad_()

    def of_parameters(lam, gamma):
        return function(A, lam, gamma)

    assert gradcheck(of_parameters, point, check_forward_ad=True)
    assert gradgradcheck(of_parameters, point, check_fwd_over_rev=True)
    lam, gamma = lam.detach(), gamma.detach()
    scale = of_parameters(lam, gamma).sum() / (lam[:, :, None] * A * gamma).sum()

    def loss(S):
        return S.pow(3).sum()

    got = hessian(lambda *p: loss(of_parameters(*p)), (0, 1))(lam, gamma)
    assert_close(got, hessian(lambda lam, gamma: loss(scale * lam[:, :, None] * A * gamma), (0, 1))(lam, gamma))


@shapes
def test_delta_weight(shape):
    _, _, _, A, B, lam, gamma = draw_layer(shape)
    assert gradcheck(lambda *p: delta_weight(A, B, *p, 0.7, *shape[:2]), (lam, gamma), check_forward_ad=True)


@pytest.mark.parametrize("form", ALL_FORMS)
@shapes
def test_update_of_ternary_bases(form, shape):
    """As a matrix, under torch.func too."""
    _, _, _, lam, gamma, bases = draw((*shape[:2], 3), form)
    pattern, scale = bases.pattern(5)

    def function(lam, gamma):
        return sparse_delta_weight(pattern, scale, lam, gamma, 0.7, *shape[:2])

    assert gradcheck(function, (lam, gamma), check_forward_ad=True)
    point = lam.detach(), gamma.detach()
    expected = torch.autograd.functional.jacobian(function, (lam, gamma))
    for transform in (jacrev, jacfwd):
        assert_close(transform(function, (0, 1))(*point), expected)


def test_layers():
    layer = make_layer(5, 7, 2, dtype=torch.float64)
    x = normal(3, 5, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters() if "randlora" in name}

    def loss(parameters):
        return functional_call(layer, parameters, (x,)).pow(2).sum()

    assert_close(hessian(loss)(parameters), jacrev(jacrev(loss))(parameters))


def test_forward_over_forward_is_refused():
    """PyTorch would silently leave the outer derivative out."""
    ours, _, point = ours_and_reference((5, 7, 2))
    A, lam, gamma = draw_factors(3, 2, 5, torch.float64)
    for function, argument in (
        (lambda lam: ours(*point[:3], lam, point[4]).sum(), point[3]),
        (lambda lam: unique_base(A, lam, gamma).sum(), lam),
    ):
        with pytest.raises(RuntimeError, match=r"cannot be differentiated forward twice.*torch\.func\.hessian"):
            jacfwd(jacfwd(function))(argument)
