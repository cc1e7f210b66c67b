"""``randlora.Linear``: a linear layer with RandLoRA adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .. import planner
from ..bases.random_bases import RandomBases
from ..distributed.parallelized import distributed_weight
from ..functional import compute_dtype, linear_of
from ..private_torch import NonDynamicallyQuantizableLinear
from ..undo import all_or_nothing
from . import base_layer as base_layers
from . import initial, offload, quantized, update_cache
from .bypassed import Noticed
from .cached_forward import CachedForward, stand_for_others
from .linears import is_transposed, require_linear
from .mixed_batch import MixedBatch, add_updates
from .ordinary import own, plain_weight
from .outputs import Rest, together
from .randlora_layer import BaseTensors, RandLoraLayer


class Linear(nn.Linear, RandLoraLayer, CachedForward, Noticed):
    """Wraps an ``nn.Linear`` and adds ``dW = alpha / r * sum_i B_i diag(lambda_i) A diag(gamma_i)`` to its weight.

    The base layer is frozen; ``randlora_lambda[adapter_name]`` and ``randlora_gamma[adapter_name]`` are trained.

    Args:
        base_layer: the ``nn.Linear`` to adapt (``weight [out, in]``), a transformers ``Conv1D`` (``[in, out]``), or any
            other module that takes ``x [..., in]`` to ``[..., out]`` and says so in ``in_features`` and
            ``out_features``: quantised layers of any library. It computes its own product.
        adapter_name: name of the first adapter; more come with :meth:`update_layer`.
        randlora_A, randlora_B: bases ``[r, 1, >= min_dim]`` and ``[>= max_dim, >= num_bases, r]``, or mappings from
            adapter name to them, such as PEFT's ``BufferDict``.
        r: rank of one base. A lower rank means more bases and more trained numbers: about
            ``min_dim * (1 + min_dim / r)`` of them.
        randlora_alpha: the update is scaled by ``randlora_alpha / r``. ``"auto"``: the rule of
            :mod:`randlora.layers.initial` gives it and gamma's start, from this layer's shape alone.
        randlora_dropout: dropout probability on the update's input.
        init_weights: True: the update starts at zero. False: lambda random, gamma ``1 / max_dim``.
        bases: a :class:`randlora.RandomBases` to use. Without it and without randlora_A and randlora_B the layer takes
            its bases from a process-wide store (dense, seed 0) that grows on demand, so layers share memory.
        num_bases: number n of bases; default ``ceil(min_dim / r)``, which makes the update full-rank. Fewer are
            cheaper and give rank ``n * r``.

        strategy: how to compute the update: ``"factored"``, ``"materialized"``, ``"merged"``, or ``"auto"``, which
            takes the cheapest exact one per call (:func:`randlora.explain` shows it). Can be changed later.

    Attribute ``workspace``: bytes that temporaries may take, 0 (default) for no limit; see
    :func:`randlora.functional.linear`. Inside :func:`randlora.inference_cache`, repeated calls under ``no_grad`` in
    eval mode use an update that is built once.

    Parameters are fp32 next to 16-bit weights, otherwise in the weight's dtype. The state dict holds
    ``base_layer.*``, ``randlora_lambda.<adapter>`` and ``randlora_gamma.<adapter>``; never the bases.

    Raises:
        TypeError, ValueError: for arguments that do not fit, before the base layer is touched.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        randlora_A: BaseTensors = None,
        randlora_B: BaseTensors = None,
        r: int = 32,
        randlora_alpha: initial.Alpha = 640,
        randlora_dropout: float = 0.0,
        init_weights: bool = True,
        *,
        bases: RandomBases | None = None,
        num_bases: int | None = None,
        strategy: str = "auto",
    ) -> None:
        super(nn.Linear, self).__init__()  # nn.Linear's own would make a second weight
        if isinstance(base_layer, RandLoraLayer):
            raise TypeError("base_layer is adapted already: add an adapter with its update_layer()")
        if isinstance(base_layer, NonDynamicallyQuantizableLinear):
            raise TypeError(
                "base_layer is the out_proj of a torch.nn.MultiheadAttention, which never calls it: use "
                'randlora.MultiheadAttention(attention, projections=("out_proj",))'
            )
        features, transposed = require_linear(base_layer), is_transposed(base_layer)
        planner.require_strategy(strategy)
        base_layers.check(base_layer, *features, transposed)
        self.strategy, self.workspace = strategy, 0
        self._init_randlora(base_layer, *features, fan_in_fan_out=transposed)
        self.update_layer(
            adapter_name,
            randlora_A,
            randlora_B,
            r,
            randlora_alpha,
            randlora_dropout,
            init_weights,
            bases=bases,
            num_bases=num_bases,
        )
        with all_or_nothing(base_layer):
            base_layer.requires_grad_(False)
            quantized.prepare(base_layer)

    base_layer: nn.Linear  # or what behaves like one
    reset_parameters = RandLoraLayer.reset_parameters  # nn.Linear's would fill the base layer's weight

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (with merged adapters in it)."""
        self._note("_was_read")
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would not let a property be assigned a parameter; torchao's quantize_ assigns a layer its weight.
        if name in ("weight", "bias") and "base_layer" in self._modules:
            setattr(self.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """nn.Module's. Raises ``ValueError`` for parts of the base layer: a parallel plan must name that itself.

        The plan's hooks would stand on this layer, and be lost with it when the adapters are taken out.
        """
        if name in ("weight", "bias") or "." in name:
            raise ValueError(
                f"{name!r} is the base layer's, which a parallel plan must name itself, as in '...q_proj.base_layer': "
                "name it in the plan, or parallelize the model before it is adapted"
            )
        super().register_parameter(name, param)

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]`` in the dtype that the base layer gives.

        Further arguments are for a base layer of a class of the user's own, which gets them as they are. If it returns
        a tuple, the update is added to the tensor at its head, and the rest is handed on.

        Raises:
            TypeError: the base layer returns no such thing. ValueError: a tensor of another shape; lambda, gamma or the
                weight are on the meta device while `x` is not.
        """
        self._note("_was_called")
        if x is None:
            x = base_layers.first_argument(self.base_layer, kwargs)
        kept = update_cache.current()
        if kept is not None and (self.training or torch.is_grad_enabled()):
            kept.forget(self)  # the step that may follow need not move a version counter
            kept = None
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.mixed_batch is not None and not self.disable_adapters:
            x = self._moved(x)
            if distributed_weight(self.base_layer) is not None:
                return self._of_shard(x, list(self.randlora_lambda), *args, **kwargs)
            result, rest = self._product(x, *args, **kwargs)
            return together(self._add_mixed(self.mixed_batch, x, result), rest)
        adapters = [name for name in self._active_adapters if name not in self.merged_adapters]
        if self.disable_adapters or not adapters:
            base_layers.require_numbers(self.base_layer, x)
            product: Tensor = quantized.product(self.base_layer, x, *args, **kwargs)
            return product
        weight = None if args or kwargs else self._plain_weight()
        if weight is None:
            x = self._moved(x)
            if distributed_weight(self.base_layer) is not None:
                return self._of_shard(x, adapters, *args, **kwargs)
        dtype = compute_dtype(x)
        if kept is not None and not (args or kwargs or x.is_meta or stand_for_others(x)):
            cached = self.forward_with(kept, x, dtype, adapters, weight)
            if cached is not None:
                return cached
        rest, others = None, adapters
        if weight is None:
            result, rest = self._product(x, *args, **kwargs)
        else:
            bias = own(self._modules["base_layer"], "bias")
            base_layers.require_weight(weight, bias, x, self._weight_shape)
            result, others = self._update(x, dtype, adapters[0], weight, bias), adapters[1:]
        for adapter in others:
            result = result + self._update(x, dtype, adapter, None, None).to(result.dtype)
        return together(result, rest)

    def _add_mixed(self, batch: MixedBatch, x: Tensor, result: Tensor) -> Tensor:
        """`result`, the base layer's, and for every sample in `x` the update of its own adapter."""
        dtype = compute_dtype(x)
        return add_updates(
            batch, x, result, self.randlora_lambda,
            lambda rows, name: self._update(rows, dtype, name, None, None),
        )  # fmt: skip

    def _of_shard(self, x: Tensor, adapters: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """The same for a base layer of which every rank has a part."""
        from ..distributed import tensor_parallel  # which imports torch.distributed

        return tensor_parallel.forward(self, x, adapters, *args, **kwargs)

    def _product(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Rest]:
        return base_layers.product(self.base_layer, x, self.in_features, self.out_features, *args, **kwargs)

    def _moved(self, x: Tensor) -> Tensor:
        """The input where accelerate's hooks would take it for the base layer."""
        device = offload.input_device(self.base_layer)
        return x if device is None or x.is_meta else x.to(device)

    def _update(
        self, x: Tensor, dtype: torch.dtype, adapter: str, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        strategy = self.strategy if weight is not None else planner.without_weight(self.strategy)
        A, B, pattern, factor = self._bases_for_call(adapter, dtype, x.device)
        p = self.dropout_of(adapter)
        return linear_of(
            x, weight, bias, A, B, *self._trained(adapter, x.device), self.scaling[adapter] * factor, p, dtype,
            strategy, self.out_features, self.fan_in_fan_out, self.workspace, None, pattern,
        )  # fmt: skip

    def base_is_plain(self) -> bool:
        """Whether the base layer does nothing but its product with a frozen weight, so that the op may do it."""
        return self._plain_weight() is not None

    def _plain_weight(self) -> Tensor | None:
        """The weight of such a base layer, not read by way of ``self.weight``, which would note that."""
        weight = plain_weight(self._modules["base_layer"])
        trained = weight is not None and weight.requires_grad and torch.is_grad_enabled()
        return None if trained else weight

    def _apply(self, fn: Callable[[Tensor], Any], recurse: bool = True) -> Linear:
        super()._apply(fn, recurse)
        if self._unmerged_weight is not None:  # travels with the weight, but is no part of the state dict
            kept = self._unmerged_weight
            self._unmerged_weight = (quantized.moved(fn, kept[0]),) if isinstance(kept, tuple) else fn(kept)
        return self

    def _get_name(self) -> str:
        return "randlora.Linear"

    def extra_repr(self) -> str:
        return self._description()
