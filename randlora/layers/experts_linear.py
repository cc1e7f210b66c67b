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
from . import experts_grouped, offload
from .base_layer import name_of
from .experts_form import sizes
from .merging import Trained, added
from .randlora_layer import RandLoraLayer


class ExpertsLinear(RandLoraLayer, nn.Module):
    """The update of a parameter ``[experts, out, in]`` (``[experts, in, out]`` where `fan_in_fan_out`).

    It stands in a :class:`randlora.Experts` under the name of the parameter, which stays in ``base_layer`` there.
    ``randlora_lambda[adapter]`` is ``[experts, r, n]`` and ``randlora_gamma[adapter]`` ``[experts, n, min_dim]``; all
    experts share the bases. Attributes and methods are those of :class:`randlora.RandLoraLayer`.

    Args:
        experts: the :class:`randlora.Experts` that it is a part of. weight_name: the parameter's name.
        adapter_name, strategy, settings: as for :class:`randlora.Linear`.

    Attributes:
        workspace: bytes of temporaries at most, as far as that can be had; 0: no limit, but 512 MiB where all experts
            are computed at once.
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

    def _update(
        self, adapter: str, dtype: torch.dtype, device: torch.device, trained: tuple[Tensor, Tensor] | None = None
    ) -> Callable[..., Tensor]:
        """A function of an expert's number, its tokens, and its weight and bias or None: the product with an update.

        `trained`: lambda and gamma, where they are not the adapter's own tensors.
        """
        A, B, pattern, factor = self._bases_for_call(adapter, dtype, device)
        # Not one by one: the gradient of a single view would be as large as that of all.
        lam, gamma = (part.unbind() for part in trained or self._trained(adapter, device))
        p, scaling, alone = self.dropout_of(adapter), self.scaling[adapter] * factor, planner.without_weight

        def compute(expert: int, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
            strategy = self.strategy if weight is not None else alone(self.strategy)
            return linear_of(
                x, weight, bias, A, B, lam[expert], gamma[expert], scaling, p, dtype, strategy, self.out_features,
                self.fan_in_fan_out, self.workspace, None, pattern,
            )  # fmt: skip

        return compute

    # ---- all experts at once ----

    def takes_all_at_once(
        self, adapter: str, counts: Sequence[int], dtype: torch.dtype, device_type: str, form: Lists | str | None,
        need_x: bool, need_parameters: bool,
    ) -> bool:  # fmt: skip
        """Whether a call with so many tokens for each expert is computed by :mod:`randlora.layers.experts_grouped`, if
        nothing else is against it. Arguments as there.
        """
        n, r = self.num_bases[adapter], self.r[adapter]
        sizes = self.in_features, self.out_features, n, r
        return (
            self.strategy == "auto"
            and not self.dropout_of(adapter)
            and experts_grouped.is_suitable(device_type, dtype, self.num_experts or 0, (*sizes[:2], n * r))
            and experts_grouped.is_cheaper(counts, sizes, dtype, device_type, form, need_x, need_parameters)
        )

    def _grouped(
        self, adapter: str, x: Tensor, counts: Sequence[int], weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """The result by :mod:`randlora.layers.experts_grouped`; None where that cannot be had, or would take longer."""
        device = x.device
        if dtype != x.dtype or not experts_grouped.is_possible(x, weight, bias):
            return None
        lam, gamma = self._trained(adapter, device)
        grad, found, bases = torch.is_grad_enabled(), self._pattern(adapter, device), self.bases[adapter]
        needs = grad and x.requires_grad, grad and (lam.requires_grad or gamma.requires_grad)
        if not self.takes_all_at_once(adapter, counts, dtype, device.type, planner.form(found and found[0]), *needs):
            return None

        m, M = min(self.in_features, self.out_features), max(self.in_features, self.out_features)
        part = Part(0, M, 0, m, self.num_bases[adapter], dtype, device)
        A = B = None
        if found is None:
            A, B = bases.tensors(dtype, device)
            A, B = A[:, :, :m], B[:M, : part.num_bases]
        elif bases.given is not None:  # they may be written to before backward, and are not kept as they are
            return None

        def alone(x: Tensor, lam: Tensor, gamma: Tensor) -> Tensor:
            return each(x, counts, weight, bias, self._update(adapter, dtype, device, (lam, gamma)))

        call = experts_grouped.Call(
            counts=counts,
            make_bases=lambda: bases.draw_part(part),
            scaling=self.scaling[adapter] * bases.scale,
            wide=self.in_features <= self.out_features,
            transposed=self.fan_in_fan_out,
            workspace=self.workspace,
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
    if experts_grouped.is_possible(x, weight, bias):
        return experts_grouped.products(x, counts, weight, bias, transposed)

    def compute(_: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.t() if transposed else weight, bias)

    return each(x, counts, weight, bias, compute)
