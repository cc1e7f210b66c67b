"""One weight of all experts as a layer of its own: for each expert a product with its weight and its update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import planner
from ..bases.parts import Part
from ..checks import require_dtype
from ..costs.lists import Lists
from ..distributed import zero3
from ..distributed.fsdp import is_sharded
from ..distributed.gathering import is_dtensor
from ..dtypes import at_least_fp32
from ..functional import compute_dtype, flat_bases, linear_of
from . import experts_choice, experts_grouped, offload
from .base_layer import name_of
from .experts_form import sizes
from .merging import Trained, added
from .randlora_layer import RandLoraLayer

# Of an expert's number, its tokens, and its weight and bias or None: the product with an update.
Compute = Callable[[int, Tensor, Tensor | None, Tensor | None], Tensor]


class ExpertsLinear(RandLoraLayer, nn.Module):
    """The update of a parameter ``[experts, out, in]`` (``[experts, in, out]`` where `fan_in_fan_out`).

    It stands in a :class:`randlora.Experts` under the name of the parameter, which stays in ``base_layer`` there.
    ``randlora_lambda[adapter]`` is ``[experts, r, n]`` and ``randlora_gamma[adapter]`` ``[experts, n, min_dim]``; all
    experts share the bases. Attributes and methods are those of :class:`randlora.RandLoraLayer`.

    Args:
        experts: the :class:`randlora.Experts` that it is a part of. weight_name: the parameter's name.
        adapter_name, strategy, settings: as for :class:`randlora.Linear`.

    Attributes:
        workspace: bytes of temporaries at most, as far as that can be had; 0: no limit. All experts are computed at
            once only where one of them has room in it, and 0 means pieces of 512 MiB there.
    """

    def __init__(
        self, experts: nn.Module, weight_name: str, adapter_name: str, strategy: str = "auto", **settings: Any
    ) -> None:
        super().__init__()
        planner.require_strategy(strategy)
        self._experts = (experts,)  # a tuple: it is no part of this module
        base = self.get_base_layer()
        self.weight_name, self.num_experts = weight_name, base.num_experts
        self.strategy, self.workspace = strategy, 0
        self._init_randlora(None, *sizes(base, weight_name), fan_in_fan_out=base.is_transposed)
        self.update_layer(adapter_name, **settings)

    def get_base_layer(self) -> Any:
        """The experts module, as it was before it was adapted."""
        return self._experts[0].base_layer

    @property
    def weight(self) -> Tensor:
        """The parameter (with merged adapters in it)."""
        weight: Tensor = getattr(self.get_base_layer(), self.weight_name)
        return weight

    def base_is_plain(self) -> bool:
        """As of :class:`randlora.Linear`: the op multiplies with the frozen weight itself."""
        return True

    def mixable_adapters(self) -> list[str]:
        raise ValueError("adapter_names: experts get the tokens that are routed to them, not samples")

    def acting(self) -> list[str]:
        """The adapters that are to be added in a call: active, not merged, not disabled."""
        if self._disable_adapters:
            return []
        return [name for name in self._active_adapters if name not in self.merged_adapters]

    # ---- a call ----

    def forward(self, x: Tensor, counts: Sequence[int], weight: Tensor, bias: Tensor | None) -> Tensor:
        """``x [tokens, in]`` to ``[tokens, out]``: the first ``counts[0]`` tokens by expert 0, the next by expert 1...

        For backward it keeps `x`. Dense updates are built for one expert at a time, or scaled bases for as many as
        `workspace` has room for, where all are computed at once (:mod:`randlora.layers.experts_grouped`).

        Args:
            weight, bias: of all experts, as a call has them; bias ``[experts, out]`` or None.
        """
        adapters, dtype = self.acting(), compute_dtype(x)
        if weight.shape != self._weight_shape:
            zero3.require_whole(weight, f"the experts' {self.weight_name}", "to compute with")
            raise ValueError(
                f"the experts' {self.weight_name} must have the shape that was adapted, {list(self._weight_shape)}, "
                f"got {list(weight.shape)}: was the module replaced?"
            )
        if not adapters:
            return routed(x, counts, weight, bias, self.fan_in_fan_out)
        if len(adapters) == 1:
            y = self._grouped(adapters[0], x, counts, weight, bias, dtype)
            if y is not None:
                return y
        first, *others = [self._update(name, dtype, x.device) for name in adapters]

        def compute(expert: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = first(expert, x, weight, bias)
            for other in others:
                y = y + other(expert, x, None, None).to(y.dtype)
            return y

        return each(x, counts, weight, bias, compute)

    def _update(self, adapter: str, dtype: torch.dtype, device: torch.device) -> Compute:
        return self._bound(adapter, dtype, device)(*self._trained(adapter, device))

    def _bound(self, adapter: str, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor, Tensor], Compute]:
        """What there is of an adapter at the moment, for any lambda and gamma: a function of an expert's number, its
        tokens, and its weight and bias or None, that gives the product with an update.
        """
        A, B, pattern, factor = self._bases_for_call(adapter, dtype, device)
        p, scaling, transposed = self.dropout_of(adapter), self.scaling[adapter] * factor, self.fan_in_fan_out
        strategy, out_features, workspace = self.strategy, self.out_features, self.workspace
        alone = planner.without_weight(strategy)

        def of(lam: Tensor, gamma: Tensor) -> Compute:
            # Not one by one: the gradient of a single view would be as large as that of all.
            of_expert = list(zip(lam.unbind(), gamma.unbind(), strict=True))

            def compute(expert: int, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
                return linear_of(
                    x, weight, bias, A, B, *of_expert[expert], scaling, p, dtype, alone if weight is None else strategy,
                    out_features, transposed, workspace, None, pattern,
                )  # fmt: skip

            return compute

        return of

    # ---- all experts at once ----

    def takes_all_at_once(
        self, adapter: str, counts: Sequence[int], dtype: torch.dtype, device_type: str, form: Lists | str | None,
        need_x: bool, need_parameters: bool, dropout: bool,
    ) -> bool:  # fmt: skip
        """Whether a call with so many tokens for each expert is computed by :mod:`randlora.layers.experts_grouped`, if
        the adapter is the only one that acts and nothing is against it in the tensors.

        Args:
            form, need_x, need_parameters: as for :func:`randlora.planner.choose`. dropout: whether it takes place.
        """
        if self.strategy != "auto" or dropout:
            return False
        sizes = self._sizes(adapter, dtype)
        return experts_choice.is_taken(counts, sizes, device_type, form, need_x, need_parameters, self.workspace)

    def _sizes(self, adapter: str, dtype: torch.dtype) -> experts_choice.Sizes:
        return experts_choice.Sizes(
            self.in_features, self.out_features, self.num_bases[adapter], self.r[adapter], dtype
        )

    def _grouped(
        self, adapter: str, x: Tensor, counts: Sequence[int], weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """The result by :mod:`randlora.layers.experts_grouped`; None where that cannot be had, or would take longer."""
        device, bases = x.device, self.bases[adapter]
        if dtype != x.dtype or not experts_grouped.is_possible(x, counts, weight, bias, self.in_features):
            return None
        lam, gamma = self._trained(adapter, device)
        grad, found = torch.is_grad_enabled(), self._pattern(adapter, device)
        needs = grad and x.requires_grad, grad and (lam.requires_grad or gamma.requires_grad)
        form, dropout = planner.form(found and found[0]), self.dropout_of(adapter) > 0
        if not self.takes_all_at_once(adapter, counts, dtype, device.type, form, *needs, dropout):
            return None
        sizes = self._sizes(adapter, dtype)
        part = Part(0, max(sizes.in_features, sizes.out_features), 0, sizes.m, sizes.n, dtype, device)
        A = B = None
        if found is None:
            A, B = bases.tensors(dtype, device)
            A, B = A[:, :, : sizes.m], B[: part.end, : sizes.n]
        elif bases.given is not None:  # they may be written to before backward, and are not kept as they are
            return None
        bound = self._bound(adapter, dtype, device)

        def alone(x: Tensor, lam: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return each(x, counts, weight, bias, bound(lam, gamma))

        call = experts_grouped.Call(
            counts=counts,
            sizes=sizes,
            scaling=self.scaling[adapter] * bases.scale,
            transposed=self.fan_in_fan_out,
            room=experts_choice.room(experts_choice.made(sizes, form), self.workspace),
            make_bases=lambda: bases.draw_part(part),
            alone=alone,
        )
        return experts_grouped.linear(x, lam, gamma, weight, bias, A, B, call)

    # ---- the update as a matrix ----

    def get_delta_weight(self, adapter: str, expert: int | None = None) -> Tensor:
        """``dW`` of one adapter in the parameter's layout, ``[experts, ...]``, or of one expert. fp32 or fp64."""
        self._check_adapter(adapter)
        device = self._device(adapter)
        lam, gamma = self._trained_whole(adapter, device)
        if expert is not None:
            return self._delta(adapter, lam[expert], gamma[expert], device)
        update = torch.empty(self._weight_shape, dtype=at_least_fp32(lam.dtype), device=device)
        for i, pair in enumerate(zip(lam.unbind(), gamma.unbind(), strict=True)):
            update[i] = self._delta(adapter, *pair, device)  # never all of them twice, as by torch.stack
        return update

    def get_scaled_bases(
        self, adapter: str, device: torch.device | None = None, *, expert: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Those of :meth:`randlora.RandLoraLayer.get_scaled_bases` for one expert."""
        self._check_adapter(adapter)
        A, B, lam, gamma, factor = self._update_arguments(adapter, device)
        S2, B2 = flat_bases(A, B, lam[expert], gamma[expert], factor, self.in_features, self.out_features)
        return (S2, B2) if self.in_features <= self.out_features else (B2.T, S2.T)

    # ---- merging ----

    def _merged(self, weight: Tensor, names: list[str], trained: Trained | None = None) -> Tensor:
        merged = torch.empty_like(weight)
        given = trained or {name: self._trained_whole(name, self._device(name)) for name in names}
        for i, (old, new) in enumerate(zip(weight, merged, strict=True)):  # one expert's update at a time
            updates = (self._delta(name, lam[i], gamma[i], lam.device) for name, (lam, gamma) in given.items())
            new.copy_(added(old, (update.to(weight.device) for update in updates)))
        return merged

    def _require_mergeable(self, base: nn.Module, in_place: bool, numbers: bool) -> None:
        what = f"the {self.weight_name} of the experts, a {name_of(base)},"
        weight = base._parameters.get(self.weight_name)
        if in_place and (is_sharded(base) or is_dtensor(weight)):
            raise ValueError(
                f"{what} is kept in parts by several processes: save the adapter and merge it into a model that is not"
            )
        if weight is None:
            raise TypeError(f"{what} must be a parameter to merge into: was the module replaced?")
        require_dtype(f"the dtype of {what[:-1]}", weight.dtype)
        if in_place:
            zero3.require_whole(weight, what[:-1], "to merge into", writing=True)
        if zero3.shape_of(weight) != self._weight_shape:
            raise ValueError(f"{what} must have shape {list(self._weight_shape)}, got {list(zero3.shape_of(weight))}")
        if numbers:
            offload.require_numbers(offload.read(base, self.weight_name), what[:-1], "to merge into")

    def extra_repr(self) -> str:
        return f"{self.num_experts} experts, {self._description()}"


# ---- without a layer ----


def each(
    x: Tensor,
    counts: Sequence[int],
    weight: Tensor,
    bias: Tensor | None,
    compute: Callable[[int, Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """``compute(expert, its tokens, its weight, its bias)`` of all experts that have tokens, one after the other."""
    # Where nobody has any, the first one gets them all the same: every parameter has a gradient.
    hit = [expert for expert, count in enumerate(counts) if count] or [0]
    parts, weights = x.split(list(counts)), weight.unbind()
    biases = [None] * len(counts) if bias is None else bias.unbind()
    return torch.cat([compute(i, parts[i], weights[i], biases[i]) for i in hit])


def routed(x: Tensor, counts: Sequence[int], weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    """The products of a parameter that has no adapter."""
    in_features = weight.shape[1 if transposed else 2]
    if experts_grouped.is_possible(x, counts, weight, bias, in_features):
        return experts_grouped.products(x, counts, weight, bias, transposed)

    def compute(_: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if transposed else weight, bias)

    return each(x, counts, weight, bias, compute)
