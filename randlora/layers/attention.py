"""``randlora.MultiheadAttention``: RandLoRA on the projections of ``torch.nn.MultiheadAttention``.

torch's module never calls its projections: it hands their weights to one function, so an adapted layer put in their
place would do nothing. Here the module is taken apart into four linear layers that are called. The encoder layers of
``torch.nn`` read the weights too; :func:`disable_fast_path` is for models with these.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..undo import all_or_nothing
from . import initial, offload
from .attention_masks import merged_mask
from .attention_parts import OF_EVERY_MODULE, Origin, check_base, copied, linear_of, require_unsharded
from .fast_path import disable_fast_path, restore_fast_path
from .joint import Together
from .linear import Linear
from .randlora_layer import RandLoraLayer

__all__ = ["PROJECTIONS", "MultiheadAttention", "disable_fast_path", "restore_fast_path"]

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


class MultiheadAttention(nn.MultiheadAttention):
    """Takes an ``nn.MultiheadAttention`` apart and adds RandLoRA updates to its projections.

    ``q_proj``, ``k_proj``, ``v_proj`` and ``out_proj`` are :class:`randlora.Linear` layers around an ``nn.Linear``
    each, or that plain ``nn.Linear`` where `projections` leaves it out; each has an update of its own, as in models
    with separate projections. Activating, merging and deleting adapters is done on these layers.

    Args:
        base_layer: the module to adapt; any ``kdim``, ``vdim``, ``bias``, ``add_bias_kv``, ``add_zero_attn``,
            ``dropout`` and ``batch_first``. Its parameters are copied, itself stays as it is.
        adapter_name: name of the first adapter; more come with :meth:`add_adapter`.
        projections: names of the projections to adapt.
        **settings: keyword arguments of :class:`randlora.Linear` (``r``, ``randlora_alpha``, ``bases``, ...), the same
            for every projection.

    Settings (``embed_dim``, ``num_heads``, ``batch_first``, ...) have torch's names. ``in_proj_weight``,
    ``in_proj_bias`` and ``q_proj_weight``, ``k_proj_weight``, ``v_proj_weight`` are there for reading, with merged
    adapters in them. The state dict holds ``q_proj.*`` and so on, ``bias_k``, ``bias_v``. A
    ``torch.nn.TransformerEncoder`` around it needs :func:`disable_fast_path`.

    Raises:
        TypeError, ValueError: a base layer whose forward is not torch's own or that has hooks or parts of its own
            (all of which would be lost), one that FSDP2 has sharded, and arguments that do not fit.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    out_proj: nn.Linear  # type: ignore[assignment]  # torch's is a class of its own, which is never called

    def __init__(
        self,
        base_layer: nn.MultiheadAttention,
        adapter_name: str = "default",
        *,
        projections: Sequence[str] = PROJECTIONS,
        **settings: Any,
    ) -> None:
        super(nn.MultiheadAttention, self).__init__()  # nn.MultiheadAttention's own would make a second set of weights
        if isinstance(base_layer, MultiheadAttention):
            raise TypeError("base_layer is adapted already: add an adapter with its add_adapter()")
        check_base(base_layer)
        require_unsharded(base_layer, "base_layer")
        vars(self).update({key: value for key, value in vars(base_layer).items() if key not in OF_EVERY_MODULE})
        out_proj = base_layer.out_proj
        flags = {name: None if p is None else p.requires_grad for name, p in base_layer._parameters.items()}
        flags |= {f"out_proj.{name}": p.requires_grad for name, p in out_proj.named_parameters()}
        packed, bias = base_layer.in_proj_weight, base_layer.in_proj_bias
        self._origin = Origin(type(base_layer), type(out_proj), packed is not None, flags)
        # True here, and it keeps nn.TransformerEncoderLayer from its fused path, which would read the weights.
        self._qkv_same_embed_dim = False
        for i, name in enumerate(PROJECTIONS[:3]):
            rows = slice(i * self.embed_dim, (i + 1) * self.embed_dim)
            weight = getattr(base_layer, f"{name}_weight") if packed is None else packed
            setattr(self, name, linear_of(nn.Linear, weight, bias, slice(None) if packed is None else rows, rows))
        self.out_proj = linear_of(nn.Linear, out_proj.weight, out_proj.bias)
        for name in ("bias_k", "bias_v"):
            if (parameter := getattr(base_layer, name)) is not None:
                setattr(self, name, copied(parameter, parameter.requires_grad))
        self.train(base_layer.training)
        self.add_adapter(adapter_name, projections, **settings)

    # ---- adapters ----

    def add_adapter(
        self,
        adapter_name: str,
        projections: Sequence[str] = PROJECTIONS,
        strategy: str = "auto",
        **settings: Any,
    ) -> None:
        """Add an adapter to these projections, wrapping those that have none yet; raises before anything is changed.

        It becomes active if the attention has no active adapter, and otherwise waits in all of them. `strategy` is for
        the layers that are wrapped now. Other arguments as for :class:`randlora.Linear`.
        """
        layers = {name: getattr(self, name) for name in _check_projections(projections)}
        for name, layer in layers.items():
            if isinstance(layer, RandLoraLayer) and adapter_name in layer.randlora_lambda:
                raise ValueError(f"{name} already has an adapter named {adapter_name!r}: delete it first")
            # A trial without memory: the settings may fit one projection and not the next.
            trial = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            Linear(trial, adapter_name, strategy=strategy, **settings)
        settings = initial.for_layers(settings, [(layer.in_features, layer.out_features) for layer in layers.values()])

        together = Together(getattr(self, name) for name in self.projections)
        with all_or_nothing(self):
            for name, layer in layers.items():
                if isinstance(layer, RandLoraLayer):
                    layer.update_layer(adapter_name, **settings)
                else:
                    layer = Linear(layer, adapter_name, strategy=strategy, **settings).train(self.training)
                    setattr(self, name, layer)
                together.join(layer)

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projections that are wrapped."""
        return tuple(name for name in PROJECTIONS if isinstance(getattr(self, name), RandLoraLayer))

    def unwrap(self) -> nn.MultiheadAttention:
        """An ordinary module with the present weights, merged adapters included; those not merged are left out.

        It has the base layer's class and ``requires_grad`` flags, this module's settings and training flag, parameters
        of its own and no hooks.
        """
        self.check_unwrap()
        return self.unwrapped_with(lambda name: operator.attrgetter(name)(self))

    def unwrapped_with(self, value: Callable[[str], Tensor]) -> nn.MultiheadAttention:
        """The same with copies of ``value(name)`` as parameters, by their names in the state dict of torch's module."""
        origin = self._origin
        module = origin.cls.__new__(origin.cls)
        nn.Module.__init__(module)
        settings = {k: v for k, v in vars(self).items() if k not in OF_EVERY_MODULE and k != "_origin"}
        vars(module).update(settings, _qkv_same_embed_dim=origin.packed)
        out_proj: Any = origin.out_proj_cls(1, 1, bias=False, device="meta")
        out_proj.in_features = out_proj.out_features = self.embed_dim
        module.out_proj = out_proj
        for path, flag in origin.requires_grad.items():
            owner, name = (out_proj if path.startswith("out_proj.") else module), path.rpartition(".")[2]
            owner.register_parameter(name, None if flag is None else copied(value(path), flag))
        return module.train(self.training)

    def check_unwrap(self) -> None:
        """Raises ``ValueError`` if :meth:`unwrap` would lose weights, as they are offloaded."""
        if any(offload.hooks(part) for part in self.modules()):
            raise ValueError(
                "an adapted attention cannot be put together again while it is offloaded: call "
                f"{offload.REAL_AGAIN} first"
            )

    # ---- torch's names for the input projections, for reading ----

    @property
    def in_proj_weight(self) -> Tensor | None:
        """``[3 * embed_dim, embed_dim]``, put together at every access; None where kdim or vdim differ."""
        return torch.cat(tuple(layer.weight for layer in self._inputs())) if self._origin.packed else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """``[3 * embed_dim]``, put together at every access."""
        biases = tuple(layer.bias for layer in self._inputs())
        return None if biases[0] is None else torch.cat(biases)

    @property
    def q_proj_weight(self) -> Tensor:
        return self.q_proj.weight

    @property
    def k_proj_weight(self) -> Tensor:
        return self.k_proj.weight

    @property
    def v_proj_weight(self) -> Tensor:
        return self.v_proj.weight

    def _inputs(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        return self.q_proj, self.k_proj, self.v_proj

    # ---- attention ----

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results of ``nn.MultiheadAttention.forward``; ``need_weights=False`` needs less memory.

        Raises:
            ValueError, TypeError: inputs and masks that do not fit, `is_causal` without `attn_mask` (it is only a hint
                about it, as in torch), nested tensors.
        """
        self._check_inputs(query, key, value)
        if is_causal and attn_mask is None:
            raise ValueError("is_causal=True says that attn_mask is causal and needs it, got attn_mask=None")
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        length_first = batched and not self.batch_first

        # Projected as they come: a transposed copy would have to be kept for backward. [batch, heads, length, head_dim]
        q, k, v = (
            self._split(_call(layer, t, length_first), length_first)
            for layer, t in zip(self._inputs(), (query, key, value), strict=True)
        )
        if q.shape[0] != k.shape[0]:
            raise ValueError(f"query and key must have the same batch size, got {q.shape[0]} and {k.shape[0]}")
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if causal else merged_mask(attn_mask, key_padding_mask, q, k)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._append(k, self.bias_k), self._append(v, self.bias_v)
        if self.add_zero_attn:
            k, v = (F.pad(t, (0, 0, 0, 1)) for t in (k, v))
        more = (self.bias_k is not None) + bool(self.add_zero_attn)
        if mask is not None and more:
            mask = F.pad(mask, (0, more))

        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = F.dropout(F.softmax(scores if mask is None else scores + mask, dim=-1), dropout)
            out = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, causal)
        out = (out.permute(2, 0, 1, 3) if length_first else out.transpose(1, 2)).flatten(-2)
        out = _call(self.out_proj, out, length_first)
        if batched:
            return out, weights
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    def _split(self, t: Tensor, length_first: bool) -> Tensor:
        t = t.unflatten(-1, (self.num_heads, self.head_dim))
        return t.permute(1, 2, 0, 3) if length_first else t.transpose(1, 2)

    def _append(self, t: Tensor, bias: Tensor) -> Tensor:
        row = bias.to(t.dtype).view(1, self.num_heads, 1, self.head_dim)
        return torch.cat([t, row.expand(t.shape[0], -1, -1, -1)], dim=2)

    def _check_inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        if query.is_nested or key.is_nested or value.is_nested:
            raise ValueError(
                "adapted attention takes no nested tensors; where a torch.nn.TransformerEncoder makes them, call "
                "randlora.disable_fast_path(model)"
            )
        if query.dim() not in (2, 3) or not query.dim() == key.dim() == value.dim():
            raise ValueError(
                f"query, key and value must all have 3 dimensions (2 without a batch), got {query.dim()}, {key.dim()} "
                f"and {value.dim()}"
            )
        expected = (self.embed_dim, self.kdim, self.vdim)
        got = (query.shape[-1], key.shape[-1], value.shape[-1])
        if got != expected:
            raise ValueError(f"query, key and value must have {expected} features, got {got}")
        if key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"key and value must agree in length and batch, got {tuple(key.shape)} and {tuple(value.shape)}"
            )

    def _get_name(self) -> str:
        return "randlora.MultiheadAttention"

    def extra_repr(self) -> str:
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, kdim={self.kdim}, vdim={self.vdim}, "
            f"batch_first={self.batch_first}"
        )


def _check_projections(projections: Sequence[str]) -> tuple[str, ...]:
    if isinstance(projections, str) or not projections or (unknown := set(projections) - set(PROJECTIONS)):
        got = sorted(unknown) if not isinstance(projections, str) and projections else projections
        raise ValueError(f"projections must be a list of some of {', '.join(PROJECTIONS)}, got {got!r}")
    return tuple(name for name in PROJECTIONS if name in projections)


def _call(layer: Callable[[Tensor], Tensor], x: Tensor, length_first: bool) -> Tensor:
    # A batch of mixed adapters tells its samples apart by the first dimension.
    if length_first and getattr(layer, "mixed_batch", None) is not None:
        return layer(x.transpose(0, 1)).transpose(0, 1)
    return layer(x)
