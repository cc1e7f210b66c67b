"""A layer's forward inside a scope of :func:`randlora.inference_cache`, by an update that the scope holds."""

from __future__ import annotations

import functools
import operator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import planner
from ..ops.pattern import is_signs
from ..private_torch import current_stream, is_put_together, is_watched, unsafe_view
from . import base_layer as base_layers
from . import update_cache
from .ordinary import own
from .outputs import together
from .shared_state import SharedState


class CachedForward(SharedState):
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
        parts = self._modules
        if any(is_put_together(parts[name]) for name in ("base_layer", "randlora_lambda", "randlora_gamma")):
            return None  # FSDP2 writes new numbers into old memory, and no version counter moves
        device, bias = x.device, None
        sources = [part for name in adapters for part in self._held(name)]
        if weight is not None:
            bias = own(self._modules["base_layer"], "bias")
            base_layers.require_weight(weight, bias, x, self._weight_shape)
        into = weight if weight is not None and weight.dtype == dtype else None
        if self.strategy != "merged" and not planner.merges_exactly(dtype):
            into = None
        merged = into is not None
        if into is not None:  # the update alone does not depend on the weight, which need not be an ordinary tensor
            sources.append(into)
        for source in sources:
            if source.device != device:
                for name in adapters:
                    self._trained(name, device)  # raises for those that have no numbers
                return None
        patterns = (self._pattern(name, device) for name in adapters)
        if all(found is not None and is_signs(found[0]) for found in patterns):
            return None  # one token costs little more than the base layer alone
        stream = current_stream(device.index) if x.is_cuda else None  # others would have to wait
        key = merged, dtype, device, stream, *adapters
        settings = [(self.scaling[name], self._bases(name).version()) for name in adapters]

        def price() -> tuple[float, float]:
            return self.price_of_update(x, dtype, adapters)

        def build() -> Tensor:
            update = functools.reduce(operator.add, map(self.get_delta_weight, adapters))
            built = (update if into is None else into + update).to(dtype)
            # [out, in] in the place of a weight, otherwise [in, out], as it is multiplied.
            return built.t() if self.fan_in_fan_out == merged else built

        nbytes = self.in_features * self.out_features * dtype.itemsize  # a 4-bit weight has fewer elements
        cached = kept.get(self, key, sources, settings, nbytes, price, build)
        if cached is None:
            return None
        if merged:
            return F.linear(x, cached, bias)
        if weight is None:
            result, rest = self._product(x)
            return together(self._add_update(result, x, cached), rest)
        result = F.linear(x, weight.t() if self.fan_in_fan_out else weight, bias)
        return self._add_update(result, x, cached, in_place=True)

    def _add_update(self, result: Tensor, x: Tensor, update: Tensor, in_place: bool = False) -> Tensor:
        """``result + x @ update``, `update` ``[in, out]``; `result` itself, if that is allowed and possible."""
        if result.dtype != update.dtype:  # under autocast some quantised layers give the input's dtype
            return result + F.linear(x, update.t()).to(result.dtype)
        # One accumulating product: the sum is rounded once, and no pass over the output is spent on adding.
        rows = x.reshape(-1, self.in_features)
        rows = rows if rows.dtype == update.dtype else rows.to(update.dtype)
        if in_place and result.is_contiguous():
            result.view(-1, self.out_features).addmm_(rows, update)
            return result
        flat = torch.addmm(result.reshape(-1, self.out_features), rows, update)
        return unsafe_view(flat, result.shape)  # as torch.nn.functional.linear does: not a view

    def price_of_update(self, x: Tensor, dtype: torch.dtype, adapters: list[str]) -> tuple[float, float]:
        """What a call with `x` spends on the updates of `adapters`, and what building them costs."""
        tokens, size, device_type = x.numel() // self.in_features, (self.in_features, self.out_features), x.device.type
        patterns = {name: self._pattern(name, x.device) for name in adapters}
        forms = {name: planner.form(found and found[0]) for name, found in patterns.items()}
        prices = [
            planner.price_of_update(tokens, *size, self.num_bases[name], self.r[name], dtype, device_type, form)
            for name, form in forms.items()
        ]
        return sum(rent for rent, _ in prices), sum(building for _, building in prices)


def stand_for_others(x: Tensor) -> bool:
    """Whether tensors here stand for others that come later: in torch.func, CUDA graphs, torch.jit.trace, make_fx."""
    return is_watched() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
