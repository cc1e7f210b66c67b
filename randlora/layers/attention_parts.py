"""The parts of ``torch.nn.MultiheadAttention``: what is looked at and noted before it is taken apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..distributed.fsdp import is_sharded
from ..distributed.gathering import is_dtensor
from ..distributed.zero3 import require_whole
from ..private_torch import NonDynamicallyQuantizableLinear

_PARAMETERS = {"in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "bias_v"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# What nn.Module keeps in every instance; the rest of an instance's attributes are its settings.
OF_EVERY_MODULE = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}


@dataclass(frozen=True)
class Origin:
    """What the base layer was, apart from its numbers and settings, for :meth:`randlora.MultiheadAttention.unwrap`."""

    cls: type[nn.MultiheadAttention]
    out_proj_cls: type[nn.Linear]
    packed: bool  # kdim = vdim = embed_dim: one weight for q, k and v
    requires_grad: dict[str, bool | None]  # by parameter name; None: the parameter is None


def check_base(base_layer: nn.Module) -> None:
    """Raises ``TypeError`` or ``ValueError`` for a module of which taking it apart would lose something."""
    if not isinstance(base_layer, nn.MultiheadAttention):
        raise TypeError(f"base_layer must be a torch.nn.MultiheadAttention, got {type(base_layer).__name__}")
    if getattr(base_layer.forward, "__func__", None) is not nn.MultiheadAttention.forward:
        raise TypeError(
            f"base_layer must be a torch.nn.MultiheadAttention; {type(base_layer).__name__} has its own forward"
        )
    parts = {*base_layer._parameters, *base_layer._buffers, *base_layer._modules}
    if unknown := sorted(parts - _PARAMETERS - {"out_proj"}):
        raise TypeError(f"base_layer has parts that torch.nn.MultiheadAttention has not: {', '.join(unknown)}")
    if type(base_layer.out_proj) not in (NonDynamicallyQuantizableLinear, nn.Linear):
        raise TypeError(f"base_layer.out_proj must be torch's own, got {type(base_layer.out_proj).__name__}")
    if recomputed := sorted({*base_layer.out_proj._parameters, *base_layer.out_proj._buffers} - {"weight", "bias"}):
        raise TypeError(f"base_layer.out_proj has parts that torch's has not: {', '.join(recomputed)}")
    if any(map(is_dtensor, base_layer.parameters())) and not is_sharded(base_layer):
        raise ValueError(
            "base_layer has weights that are DTensors, which cannot be taken apart: adapt it first, then parallelize "
            "q_proj, k_proj, v_proj and out_proj, or their base_layer where they have one"
        )
    for name, parameter in base_layer.named_parameters():
        require_whole(parameter, f"{name} of a torch.nn.MultiheadAttention", "to copy")
    if any(getattr(base_layer, hooks) for hooks in _HOOKS):
        raise ValueError("base_layer has hooks, which would be lost: remove them and register them on the adapted one")


def require_unsharded(attention: nn.Module, what: str) -> None:
    """Raises ``ValueError`` for an attention that FSDP2 has sharded: it would not know the parts."""
    if is_sharded(attention):
        raise ValueError(
            f"{what}: the weights of its attention are sharded, and would be taken apart. Add the adapter before "
            "fully_shard"
        )


def copied(tensor: Tensor, requires_grad: bool) -> nn.Parameter:
    """A parameter with these numbers and memory of its own."""
    return nn.Parameter(tensor.detach().clone(), requires_grad=requires_grad)


def linear_of(
    cls: type[nn.Linear], weight: Tensor, bias: Tensor | None, rows: slice = slice(None), bias_rows: slice = slice(None)
) -> nn.Linear:
    """A layer of class `cls` with copies of these rows of a weight and of a bias."""
    layer = cls(1, 1, bias=bias is not None, device="meta")
    layer.weight = copied(weight[rows], weight.requires_grad)
    layer.out_features, layer.in_features = layer.weight.shape
    if bias is not None:
        layer.bias = copied(bias[bias_rows], bias.requires_grad)
    return layer
