"""What a base layer may be: looked at when it is adapted, called and merged into.

It need not stay what it was when it was adapted: ``quantize_dynamic``, torchao's ``quantize_`` and others put another
layer in its place, or another weight into it. What that computes is used as it is, or refused with the reason.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.lazy import LazyModuleMixin

from ..checks import require_dtype
from ..distributed import fsdp, zero3
from ..distributed.parallelized import cut_by_a_plan
from ..private_torch import unsafe_view
from . import offload, quantized
from .ordinary import forward_is_replaced, has_own_forward, has_weight_method, tensor_weight
from .outputs import Rest, apart
from .quantized.fp8 import is_fp8


def check(base_layer: nn.Module, in_features: int, out_features: int, transposed: bool) -> None:
    """Raises ``TypeError`` or ``ValueError`` for a layer of a supported class that cannot be adapted all the same."""
    name = type(base_layer).__name__
    if isinstance(base_layer, LazyModuleMixin) and base_layer.has_uninitialized_params():
        raise ValueError(f"base_layer is a {name} that has no size yet: call it once before adapting it")
    if 0 in (in_features, out_features):
        raise ValueError(f"base_layer is a {name} of size {in_features} -> {out_features}: there is nothing to adapt")
    weight = getattr(base_layer, "weight", None)
    if quantized.is_quantized(base_layer) or has_own_forward(base_layer) or not isinstance(weight, Tensor):
        return  # its weight is its own affair
    if not weight.is_floating_point():
        raise TypeError(f"base_layer is a {name} whose weight must be of a floating dtype, got {weight.dtype}")
    expected = (in_features, out_features) if transposed else (out_features, in_features)
    shape = tuple(zero3.shape_of(weight))
    if shape != expected:
        raise ValueError(
            f"base_layer says in_features = {in_features} and out_features = {out_features}, so its weight must have "
            f"shape {list(expected)}, got {list(shape)}: set these attributes to what the weight has"
        )


def name_of(base_layer: nn.Module) -> str:
    cls = type(base_layer)
    return cls.__name__ if cls is nn.Linear else f"{cls.__module__}.{cls.__qualname__}"


def first_argument(base_layer: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """The layer's input, taken out of `kwargs`, where a caller names it as the base layer's ``forward`` does."""
    name = next(iter(inspect.signature(base_layer.forward).parameters), "x")
    if name not in kwargs:
        raise TypeError(f"an adapted {type(base_layer).__name__} must be called with its input, got {sorted(kwargs)}")
    x: Tensor = kwargs.pop(name)
    return x


def product(
    base_layer: nn.Module, x: Tensor, in_features: int, out_features: int, *args: Any, **kwargs: Any
) -> tuple[Tensor, Rest]:
    """``base_layer(x, ...)``, as something that the update of `x` can be added to.

    Returns:
        The output, and what a layer that gives a tuple has after it: see :mod:`randlora.layers.outputs`.

    Raises:
        TypeError: no tensor. ValueError: of another shape than ``[..., out_features]``, or without numbers.
    """
    require_numbers(base_layer, x)
    blind = has_weight_method(base_layer)  # these pass no gradient on and only warn that they may not
    returned = quantized.product(base_layer, x.detach() if blind else x, *args, **kwargs)
    result, rest = apart(returned)
    name = name_of(base_layer)
    if not isinstance(result, Tensor):
        got = type(returned).__name__
        if isinstance(returned, (tuple, list)):
            got += f" of {', '.join(type(part).__name__ for part in returned)}"
        raise TypeError(
            f"the base layer, a {name}, must return a tensor for an update to be added to, or a tuple that begins with "
            f"one, got a {got}"
        )
    if x.shape[-1:] != (in_features,) or result.shape != (*x.shape[:-1], out_features):
        raise ValueError(
            f"the base layer, a {name}, must return [..., {out_features}] for an input of shape [..., {in_features}], "
            f"got {list(result.shape)} for {list(x.shape)}"
        )
    if result.is_meta and not x.is_meta:
        offload.require_numbers(result, f"what the base layer, a {name}, returns", "to add an update to")
    if torch.is_grad_enabled() and x.requires_grad and not result.requires_grad:
        mode = "training" if base_layer.training else "eval"
        return _WithoutGradient.apply(result, x, f"{name} in {mode} mode"), rest
    return result, rest


class _WithoutGradient(torch.autograd.Function):
    """``apply(y, x, name)`` is `y`, of a layer through which no gradient for x can be had; asking for it raises."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, name: str) -> Tensor:
        ctx.name = name
        return unsafe_view(y, y.shape)  # not a view, which in-place operations could not touch

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError(
            f"the base layer, a {ctx.name}, passes no gradient on to its input, so those of the layers before it would "
            "be wrong: it can be used for inference only"
        )


def require_numbers(base_layer: nn.Module, x: Tensor) -> None:
    """Raises ``ValueError`` if `x` has numbers and a parameter of the layer has none, nor a hook that brings them in.

    PyTorch answers some of such calls with memory that nobody has written to.
    """
    if x.is_meta:
        return
    for module in base_layer.modules():
        if not offload.hooks(module):
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        offload.require_numbers(tensor, f"the base layer's {name}", "to compute with")


def require_weight(weight: Tensor, bias: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> None:
    """Raises ``ValueError`` unless those of an ordinary layer have numbers for `x` and the size that was adapted."""
    if weight.shape != shape:
        zero3.require_whole(weight, "the base layer's weight", "to compute with")
        raise ValueError(
            f"the base layer's weight must have the shape that was adapted, {list(shape)}, got {list(weight.shape)}: "
            "was the layer replaced?"
        )
    if not x.is_meta:
        offload.require_numbers(weight, "the base layer's weight", "to compute with")
        if bias is not None:
            offload.require_numbers(bias, "the base layer's bias", "to compute with")


def require_mergeable(
    base_layer: nn.Module, shape: tuple[int, ...], transposed: bool, in_place: bool = True, numbers: bool = True
) -> None:
    """Raises unless adding to the layer's weight adds as much to what it computes.

    Args:
        in_place: False where the weight is only to be read. numbers: False where it may have none.

    Raises:
        TypeError: the weight is no tensor, or of a dtype that updates cannot be added to. ValueError: it has no numbers
            or another shape than `shape`, is quantised and offloaded, or a forward of the layer's own, or a hook, does
            something else with it.
    """
    name, weight = name_of(base_layer), tensor_weight(base_layer)
    kind = quantized.kind_of(base_layer)
    if kind is not None and offload.hooks(base_layer):
        raise ValueError(f"a quantised weight that is offloaded cannot be merged into: call {offload.REAL_AGAIN}")
    if kind is not None and kind.is_sure:
        return
    if weight is None:
        raise TypeError(
            f"the base layer, a {name}, has no tensor as its weight that could be merged into: {_MERGE_BEFORE}"
        )
    if kind is None:
        try:
            require_dtype("the base weight's dtype", weight.dtype)
        except TypeError as error:
            raise TypeError(f"{error}: {_MERGE_BEFORE}") from error
    if in_place:
        zero3.require_whole(weight, "the base layer's weight", "to merge into", writing=True)
    if zero3.shape_of(weight) != shape:
        raise ValueError(
            f"the base layer, a {name}, must have a weight of shape {list(shape)} to merge into, got "
            f"{list(zero3.shape_of(weight))}"
        )
    if numbers:
        offload.require_numbers(offload.read(base_layer, "weight"), "the base layer's weight", "to merge into")
    peculiar = None if cut_by_a_plan(base_layer) else _peculiarity(base_layer)
    if peculiar and (reason := _other_use_of_weight(base_layer, transposed)):
        raise ValueError(
            f"the base layer, a {name} with {peculiar}, does more than multiply by its weight: {reason}. It can be "
            "used unmerged"
        )


_MERGE_BEFORE = (
    "it can be used unmerged. To merge, load the adapter onto the model as it was before its layers were quantised or "
    "replaced, merge it there, and do that to the result"
)


def _peculiarity(base_layer: nn.Module) -> str | None:
    """What may make a layer compute something else than ``x W^T + b``."""
    with _without_accelerate(base_layer):
        if has_own_forward(base_layer) or forward_is_replaced(base_layer):
            return "a forward of its own"
    hooks = *base_layer._forward_hooks.values(), *base_layer._forward_pre_hooks.values()
    return "hooks" if any(not (zero3.is_hook(hook) or fsdp.is_hook(hook)) for hook in hooks) else None


@contextlib.contextmanager
def _without_accelerate(base_layer: nn.Module) -> Iterator[None]:
    """The layer as it is without accelerate's hook, which only moves tensors, and brings its own in."""
    attributes = vars(base_layer)
    hooked = attributes.get("forward") if "_hf_hook" in attributes else None
    if hooked is not None:
        attributes["forward"] = attributes["_old_forward"]
    try:
        yield
    finally:
        if hooked is not None:
            attributes["forward"] = hooked


def _other_use_of_weight(base_layer: nn.Module, transposed: bool) -> str | None:
    """Why ``W + D`` in place of W would not add ``x D^T`` to what the layer computes; None if it does."""
    held = {**base_layer._parameters, **base_layer._buffers}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: offload.read(base_layer, name).detach() for name, tensor in held.items() if tensor is not None}
    for name, tensor in tensors.items():
        if tensor.is_meta and tensor.is_floating_point():  # any numbers will tell
            tensors[name] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
    weight = tensors["weight"]
    in_features = weight.shape[0 if transposed else 1]
    x, change = (torch.randn(*size, generator=generator) for size in ((3, in_features), weight.shape))
    # What is cast for every call does not say into what.
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if is_fp8(weight.dtype) else (weight.dtype,)
    modes = [(module, module.training) for module in base_layer.modules()]
    base_layer.eval()
    try:
        x, exact = x.to(weight.device), weight.double()
        other = (exact + change.to(exact) * (exact.square().mean().sqrt().item() or 1.0)).to(weight.dtype)
        change = other.double() - exact
        with torch.no_grad(), _without_accelerate(base_layer):
            for dtype in dtypes:
                try:
                    before, after = (
                        apart(functional_call(base_layer, tensors | {"weight": w.clone()}, (x.to(dtype),)))[0].double()
                        for w in (weight, other)
                    )
                    break
                except RuntimeError:
                    if dtype is dtypes[-1]:
                        raise
            expected = nn.functional.linear(x.to(dtype).double(), change.T if transposed else change)
            error = torch.linalg.vector_norm(after - before - expected)
    except Exception as raised:  # whatever a class of someone else's raises
        return f"how it uses its weight cannot be found out ({type(raised).__name__}: {raised})"
    finally:
        for module, training in modes:
            module.training = training
    limit = 0.05 if dtype.itemsize <= 2 else 0.01  # what rounds its output to 16 bits may do so
    if not error <= limit * torch.linalg.vector_norm(expected):
        return "adding to its weight does not add as much to its output"
    return None
