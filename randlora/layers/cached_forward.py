"""A layer's forward inside a scope of :func:`randlora.inference_cache`, by an update that the scope holds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import planner
from ..ops.pattern import is_signs
from . import base_layer as base_layers
from . import update_cache


class CachedForward:
    """The cached half of :class:`randlora.Linear`'s forward, whose attributes it uses."""

    def forward_with(
        self,
        kept: update_cache.InferenceCache,
        x: Tensor,
        dtype: torch.dtype,
        adapters: list[str],
        weight: Tensor | None,
    ) -> Tensor | None:
        """The output by a matrix that `kept` holds; None where the call is to compute as usual.

        `weight`: the base layer's, None where it computes its product itself.
        """
        device, bias = x.device, None
        sources = [part for name in adapters for part in self._held(name)]
        if weight is not None:
            bias = base_layers.own(self._modules["base_layer"], "bias")
            base_layers.require_weight(weight, bias, x, self._weight_shape)
        merged = weight is not None and weight.dtype == dtype
        if merged and not planner.merges_exactly(dtype):
            merged = self.strategy == "merged"
        if merged:  # the update alone does not depend on the weight, which need not be an ordinary tensor
            sources.append(weight)
        for source in sources:
            if source.device != device:
                for name in adapters:
                    self._trained(name, device)  # raises for those that have no numbers
                return None
        patterns = (self._pattern(name, device) for name in adapters)
        if all(found is not None and is_signs(found[0]) for found in patterns):
            return None  # one token costs little more than the base layer alone
        stream = torch._C._cuda_getCurrentRawStream(device.index) if x.is_cuda else None  # others would have to wait
        key = merged, dtype, device, stream, *adapters
        settings = [(self.scaling[name], self._bases(name).version()) for name in adapters]

        def price() -> tuple[float, float]:
            return self.price_of_update(x, dtype, adapters)

        def build() -> Tensor:
            update = sum(self.get_delta_weight(name) for name in adapters)
            built = (weight + update if merged else update).to(dtype)
            # [out, in] in the place of a weight, otherwise [in, out], as it is multiplied.
            return built.t() if self.fan_in_fan_out == merged else built

        nbytes = self.in_features * self.out_features * dtype.itemsize  # a 4-bit weight has fewer elements
        cached = kept.get(self, key, sources, settings, nbytes, price, build)
        if cached is None:
            return None
        return F.linear(x, cached, bias) if merged else self._product_and_update(x, weight, bias, cached)

    def _product_and_update(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, update: Tensor) -> Tensor:
        """The base layer's output for `x` plus ``x @ update``, `update` ``[in, out]``."""
        own = weight is not None
        result = F.linear(x, weight.t() if self.fan_in_fan_out else weight, bias) if own else self._product(x)
        if result.dtype != update.dtype:  # under autocast some quantised layers give the input's dtype
            return result + F.linear(x, update.t()).to(result.dtype)
        # One accumulating product: the sum is rounded once, and no pass over the output is spent on adding.
        rows = x.reshape(-1, self.in_features)
        rows = rows if rows.dtype == update.dtype else rows.to(update.dtype)
        if own and result.is_contiguous():
            result.view(-1, self.out_features).addmm_(rows, update)
            return result
        flat = torch.addmm(result.reshape(-1, self.out_features), rows, update)
        return torch.ops.aten._unsafe_view(flat, result.shape)  # as torch.nn.functional.linear does: not a view

    def price_of_update(self, x: Tensor, dtype: torch.dtype, adapters: list[str]) -> tuple[float, float]:
        """What a call with `x` spends on the updates of `adapters`, and what building them costs."""
        tokens, size, device_type = x.numel() // self.in_features, (self.in_features, self.out_features), x.device.type
        prices = [
            planner.price_of_update(
                tokens, *size, self.num_bases[name], self.r[name], dtype, device_type, self._pattern(name, x.device)
            )
            for name in adapters
        ]
        return sum(rent for rent, _ in prices), sum(building for _, building in prices)


def stand_for_others(x: Tensor) -> bool:
    """Whether tensors here stand for others that come later: in torch.func, CUDA graphs, torch.jit.trace, make_fx."""
    if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
