"""``randlora.Experts``: RandLoRA on the weights of all experts of a mixture, which are one parameter.

No module is called with such a weight, so there is none that an adapted layer could replace. Here the experts as a
whole are replaced: while an adapter acts, each expert's tokens are computed with its weight and its update; otherwise
the module is called as it was. What is between the products, such as the gate, stays the module's own.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..distributed import zero3
from ..distributed.fsdp import is_sharded
from ..distributed.gathering import is_dtensor
from ..undo import all_or_nothing
from . import initial, offload
from .experts_form import check_base, counts_of, require_no_hooks, sizes, weight_names
from .experts_linear import ExpertsLinear, routed
from .joint import Together


class Experts(nn.Module, zero3.GatheredForCalls):
    """Wraps a module of fused experts and adds a RandLoRA update to the weights of each expert.

    For transformers 5's experts of any model, and others of their form (``use_experts_implementation``), whatever
    ``config._experts_implementation`` is. The parts ``gate_up_proj`` (``up_proj`` where there is no gate) and
    ``down_proj`` are :class:`randlora.layers.experts_linear.ExpertsLinear`, as far as `parameters` names them: lambda
    ``[experts, r, n]``, gamma ``[experts, n, min_dim]``, and bases that all experts share. Activating, merging and
    deleting adapters is done on these. The module itself, frozen, is ``base_layer``, and what else is asked of this
    one is answered by it.

    For backward each part keeps the tokens that come to its experts, ``[tokens * top_k, in_features]``, and nothing
    else; dense updates are built for one expert at a time. Under ``torch.compile`` it runs outside of graphs.

    Args:
        base_layer: the module to adapt.
        adapter_name: name of the first adapter; more come with :meth:`add_adapter`.
        parameters: names of the parameters to adapt; default: both.
        strategy, **settings: as for :class:`randlora.Linear`.

    Raises:
        TypeError, ValueError: a module of another form, or whose forward or hooks would not be called any more; experts
            that are spread over processes; parameters that are not ordinary ones of three dimensions; arguments that do
            not fit. Nothing is changed then.
    """

    base_layer: Any

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str = "default",
        *,
        parameters: Sequence[str] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(base_layer, Experts):
            raise TypeError("base_layer is adapted already: add an adapter with its add_adapter()")
        if not isinstance(base_layer, nn.Module):
            raise TypeError(f"base_layer must be a module of fused experts, got {type(base_layer).__name__}")
        check_base(base_layer, () if parameters is None else tuple(parameters))
        self.base_layer = base_layer
        self.train(base_layer.training)
        self.add_adapter(adapter_name, parameters, **settings)
        base_layer.requires_grad_(False)

    def add_adapter(
        self, adapter_name: str, parameters: Sequence[str] | None = None, strategy: str = "auto", **settings: Any
    ) -> None:
        """Add an adapter to these parameters; raises before anything is changed.

        It becomes active if the experts have no active adapter, and otherwise waits. `strategy` is for parameters that
        get their first adapter. Other arguments as for :class:`randlora.Linear`.
        """
        known = weight_names(self.base_layer)
        names = known if parameters is None else parameters
        if isinstance(names, str) or not names or set(names) - set(known):
            raise ValueError(f"parameters must be a list of some of {', '.join(known)}, got {parameters!r}")
        if is_sharded(self) and any(name not in self._modules for name in names):
            raise ValueError(
                "the experts are sharded: fully_shard would know nothing of new parameters. Add them before"
            )
        with all_or_nothing(self):
            settings = initial.for_layers(settings, [sizes(self.base_layer, name) for name in dict.fromkeys(names)])
            together = Together(self.adapted())
            for name in dict.fromkeys(names):
                layer = self._modules.get(name)
                if isinstance(layer, ExpertsLinear):
                    layer.update_layer(adapter_name, **settings)
                else:
                    layer = ExpertsLinear(self, name, adapter_name, strategy, **settings).train(self.training)
                    setattr(self, name, layer)
                together.join(layer)

    def adapted(self) -> list[ExpertsLinear]:
        """The parts that have, or had, adapters."""
        return [module for module in self._modules.values() if isinstance(module, ExpertsLinear)]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base_layer" not in self._modules:
                raise
            return getattr(self.base_layer, name)

    def trained_parts(self) -> tuple[Any, ...]:
        """What DeepSpeed has to gather for a call: the module's own parameters, too, as it is not called."""
        return self.base_layer, *(part for layer in self.adapted() for part in layer.trained_parts())

    # ---- a call ----

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's own arguments: ``hidden_states [tokens, hidden]``, indices and weights ``[tokens, top_k]``.

        Returns:
            ``[tokens, hidden]`` in the dtype of the hidden states.

        Raises:
            ValueError: the module's parameters have other shapes than were adapted, no numbers, or are cut over ranks.
            TypeError: other arguments.
        """
        layers = self.adapted()
        for layer in layers:
            if layer.disable_adapters and layer.merged:
                layer.unmerge()
        acts = any(layer.acting() for layer in layers)
        result: Tensor = self._routed(*self._arguments(args, kwargs)) if acts else self.base_layer(*args, **kwargs)
        return result

    def _arguments(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        if kwargs:
            signature = inspect.signature(type(self.base_layer).forward)
            args = signature.bind(self.base_layer, *args, **kwargs).args[1:]
        if len(args) != 3:
            raise TypeError(
                f"experts must be called with hidden states, indices and weights, got {len(args)} arguments"
            )
        hidden, ids, weights = args
        device = offload.input_device(self.base_layer)
        if device is not None and not hidden.is_meta:
            hidden, ids, weights = (tensor.to(device) for tensor in args)
        return hidden, ids, weights

    @torch.compiler.disable(reason="how many tokens an expert gets differs in every call")
    def _routed(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        base, shape = self.base_layer, ids.shape
        require_no_hooks(base)
        first, second = weight_names(base)
        ids = ids.reshape(-1)
        order = ids.argsort(stable=True)
        counts = counts_of(ids, base.num_experts)
        # What other ranks compute, with expert parallelism, is sorted to the end.
        pairs = order[: sum(counts)]
        y = self._product(first, hidden[pairs // shape[-1]], counts)
        y = base._apply_gate(y) if base.has_gate else base.act_fn(y)
        y = self._product(second, y, counts)
        if getattr(base, "has_post_expert_norm", False):
            y = base.post_expert_norm(y)
        y = y * weights.reshape(-1)[pairs].unsqueeze(-1)
        if len(pairs) < len(ids):
            y = F.pad(y, (0, 0, 0, len(ids) - len(pairs)))
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        result: Tensor = y[back].unflatten(0, shape).sum(dim=1).to(hidden.dtype)
        return result

    def _product(self, name: str, x: Tensor, counts: list[int]) -> Tensor:
        base = self.base_layer
        weight, bias = self._held(name, x), None
        if base.has_bias:
            bias = self._held(f"{name}_bias", x)
        layer = self._modules.get(name)
        if isinstance(layer, ExpertsLinear):
            y: Tensor = layer(x, counts, weight, bias)
            return y
        return routed(x, counts, weight, bias, base.is_transposed)

    def _held(self, name: str, x: Tensor) -> Tensor:
        tensor = offload.read(self.base_layer, name)
        if is_dtensor(tensor):
            raise ValueError(
                f"the experts' {name} is cut over ranks, by a parallel plan or fully_shard of the experts' base_layer: "
                "plans are not supported for experts, and fully_shard is, of the experts or a module around them"
            )
        if not x.is_meta:
            offload.require_numbers(tensor, f"the experts' {name}", "to compute with")
        return tensor

    def _get_name(self) -> str:
        return "randlora.Experts"
