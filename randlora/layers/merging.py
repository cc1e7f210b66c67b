"""Folding updates into the base weight, and giving the weight back bit for bit."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import zero3
from ..distributed.fsdp import hold_parts, is_sharded
from ..distributed.gathering import is_dtensor, whole
from ..distributed.parallelized import all_finite
from . import base_layer as base_layers
from . import offload, quantized
from .ordinary import keeps_its_weight, tensor_weight
from .shared_state import SharedState
from .unmerging import NOT_KEPT, copy_of_weight, merged_or_not, put_weight, recomputed, unmerged

Trained = Mapping[str, tuple[Tensor, Tensor]]  # adapter -> lambda and gamma


class Mergeable(SharedState):
    """The merging half of :class:`randlora.RandLoraLayer`, whose attributes it uses.

    ``merged_adapters`` names what is in the weight; ``_unmerged_weight`` is the weight as it was before: a tensor, or
    for quantised layers what the layer itself had, in a tuple. It is None in a merged layer whose weight was not kept.
    ``_merged_into`` has the base layer that it is of.
    """

    @property
    def merged(self) -> bool:
        return bool(self.merged_adapters)

    def merge(self, safe_merge: bool = False, adapter_names: Sequence[str] | None = None) -> None:
        """Add the updates of `adapter_names` (default: the active adapters) to the base weight.

        Computed in fp32 or fp64 and rounded once to the weight's dtype. The weight as it was is kept until
        :meth:`unmerge`, at the price of its bytes. Active adapters that are not
        merged go on acting beside it.

        A quantised weight is dequantised and quantised again in its own kind, and a warning says what that costs. Each
        merge starts from the weight as it was, with the present parameters of all merged adapters, so that several
        merges round once.

        A weight that accelerate offloads is merged into where it is kept between calls, in memory: files stay as they
        are. Of a weight that a parallel plan has cut over ranks, every rank merges into its own part.

        Args:
            safe_merge: raise ``ValueError``, with nothing changed, if the merged weight is not finite.

        Raises:
            TypeError, ValueError: see :meth:`check_merge`. Nothing is changed then, or if memory runs out.
        """
        if isinstance(adapter_names, str):
            adapter_names = [adapter_names]
        names = self.active_adapters if adapter_names is None else list(dict.fromkeys(adapter_names))
        for name in names:
            self._check_adapter(name)
        if repeated := [name for name in names if name in self.merged_adapters]:
            warnings.warn(f"already merged, left out: {', '.join(repeated)}", stacklevel=2)
            names = [name for name in names if name not in repeated]
        if not names:
            return
        self.check_merge(names)
        base, kept = self.get_base_layer(), self._unmerged_weight
        if self._is_quantized():
            self._merge_quantized(base, names, safe_merge)
            return
        weight = offload.read(base, self.weight_name)
        with torch.no_grad():
            merged = self._merged(weight, names)
            if safe_merge and not all_finite(merged):
                raise _not_finite(names)
        with merged_or_not([self]), torch.no_grad():
            if kept is None and not self.merged:
                self._unmerged_weight = copy_of_weight(self)
            self._merged_into = (base,)
            self.merged_adapters.extend(names)
            put_weight(self, merged)

    def merged_weight(self, adapter_names: Sequence[str], safe_merge: bool = False) -> Tensor:
        """The base weight with the updates of these adapters in it, as :meth:`merge` would leave it; nothing changes.

        Adapters that are merged already are not added again. What several processes hold parts of (FSDP2, a parallel
        plan, ZeRO-3) comes whole, and all of them must make this call. An ordinary weight only.

        Raises:
            ValueError: with `safe_merge`, if it is not finite.
        """
        base, names = self.get_base_layer(), [name for name in adapter_names if name not in self.merged_adapters]
        sharded = is_sharded(self) or is_sharded(base)
        if sharded:
            hold_parts([base, *self.trained_parts()])
        held = {name: self._held(name) for name in names}
        with torch.no_grad(), zero3.gathered([getattr(base, self.weight_name), *itertools.chain(*held.values())]):
            weight = offload.read(base, self.weight_name)
            if sharded:
                trained = {name: (whole(lam), whole(gamma)) for name, (lam, gamma) in held.items()}
                merged = self._merged(whole(weight), names, trained)
            else:
                merged = whole(self._merged(weight, names))
            if safe_merge and names and not all_finite(merged):
                raise _not_finite(names)
            return merged.clone() if merged is weight and zero3.is_parameter(weight) else merged.detach()

    def _merged(self, weight: Tensor, names: list[str], trained: Trained | None = None) -> Tensor:
        """`weight` with the updates of these adapters in it, rounded once.

        `trained`: their whole lambda and gamma, where the layer holds parts of them.
        """
        return added(weight, (self._delta_for(weight, name, trained) for name in names))

    def _delta_for(self, weight: Tensor, name: str, trained: Trained | None) -> Tensor:
        """``dW`` of one adapter where `weight` is; of a weight that is cut over ranks, this rank's part."""
        if trained is not None:
            return self._delta(name, *trained[name], weight.device)
        if is_dtensor(weight):
            from ..distributed import tensor_parallel  # which imports torch.distributed

            layer: Any = self
            return tensor_parallel.delta_like(layer, name, weight)
        return self.get_delta_weight(name).to(weight.device)

    def check_merge(self, adapter_names: Sequence[str], in_place: bool = True, numbers: bool = True) -> None:
        """Raise what :meth:`merge` would raise whatever the numbers are; for a look at all layers before the first.

        Args:
            in_place: False for :meth:`merged_weight`, which may be asked for weights that processes hold in parts.
            numbers: False for a model on the meta device, whose weights are somewhere else.

        Raises:
            ValueError: a weight that is made anew at every call, such as a parametrised or pruned one, or one that
                FSDP2 shards: what is added to it would be lost. One without numbers, of another shape than was adapted,
                or one that the base layer does not simply multiply by. An adapter without numbers. A layer whose weight
                its model only reads: the adapter has no effect there, and would have one if it was merged.
            TypeError: a weight that is no tensor, or of a dtype that updates cannot be added to.
        """
        base = self.get_base_layer()
        if in_place and is_sharded(self):
            raise ValueError(_SHARDED)
        kind = quantized.kind_of(base)  # transformers gives layers of HQQ's an empty `weight`, which is not theirs
        named = kind is None or self.weight_name in kind.parts
        if named and tensor_weight(base, self.weight_name) is not None and not keeps_its_weight(base, self.weight_name):
            raise ValueError(recomputed(base, self.weight_name))
        self._require_mergeable(base, in_place, numbers)
        for name in adapter_names:
            (self._trained_whole if in_place else self._trained)(name, torch.device("cpu"))
        if getattr(self, "bypassed", False) and any(
            self.randlora_lambda[n].any() and self.randlora_gamma[n].any() for n in adapter_names
        ):
            raise ValueError(_BYPASSED)
        if self._unmerged_weight is None and self.merged and self._is_quantized():
            raise ValueError(NOT_KEPT)

    def _require_mergeable(self, base: nn.Module, in_place: bool, numbers: bool) -> None:
        """Raises as :meth:`check_merge` for a weight that cannot be merged into."""
        base_layers.require_mergeable(base, self._weight_shape, self.fan_in_fan_out, in_place, numbers)

    def _is_quantized(self) -> bool:
        return isinstance(self._unmerged_weight, tuple) or quantized.is_quantized(self.get_base_layer())

    def _merge_quantized(self, base: Any, names: list[str], safe_merge: bool) -> None:
        kept = self._unmerged_weight
        original = kept[0] if isinstance(kept, tuple) else quantized.held_by(base)
        # Otherwise what is made here would be a tensor that backward refuses, or that no parameter can be made of.
        with torch.inference_mode(False), torch.no_grad():
            updates = [self.get_delta_weight(name) for name in (*self.merged_adapters, *names)]
            update = sum(updates[1:], start=updates[0])
            weight, stands_for, loss = quantized.merged_weight(base, update, original)
            if safe_merge and not torch.isfinite(stands_for).all():
                raise _not_finite(names)
        with merged_or_not([self]):
            before = quantized.replace_weight(base, weight)
            if kept is None:
                self._unmerged_weight = (before,)
            self._merged_into = (base,)
            self.merged_adapters.extend(names)
        if loss is not None:
            warnings.warn(loss, stacklevel=3)

    def unmerge(self) -> None:
        """Give the base weight back, bit for bit as it was before the first :meth:`merge`.

        Raises:
            ValueError: the base layer is another one than at the merge, which has its weight; the weight as it was
                has not been kept; or FSDP2 has sharded the layer since.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        with unmerged([self]):
            pass

    def forget_unmerged_weight(self) -> None:
        """Free the weight as it was before merging: :meth:`unmerge` cannot give it back any more."""
        self._unmerged_weight = None


def added(weight: Tensor, updates: Iterable[Tensor]) -> Tensor:
    """`weight` with these updates, rounded once to its dtype."""
    merged: Tensor = sum(updates, start=weight)
    return merged.to(weight.dtype)


_BYPASSED = (
    "its model reads the weight of this layer and never calls the layer, so that its adapter has no effect, and would "
    "have one after merging: set the adapter's randlora_lambda to zero here to leave it out; nothing was changed"
)
_SHARDED = (
    "its weight is put together by fully_shard for every call, so that a merged update would be lost: save the adapter "
    "and merge it into a model that is not sharded"
)


def _not_finite(names: Iterable[str]) -> ValueError:
    """It begins with the words that PEFT has for it."""
    which = ", ".join(names)
    return ValueError(
        f"NaNs detected in the merged weights. The adapter {which} seems to be broken: merging {which} gives NaN or "
        "infinity in the weight; nothing was changed"
    )
