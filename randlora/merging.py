"""Folding updates into the base weight, and giving the weight back bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import base_layer as base_layers
from . import offload, quantized
from .checks import require_dtype


class Mergeable:
    """The merging half of :class:`randlora.RandLoraLayer`, whose attributes it uses.

    ``merged_adapters`` names what is in the weight; ``_unmerged_weight`` is the weight as it was before: a tensor, or
    for quantised layers the parameter itself in a tuple. ``_merged_into`` has the base layer that it is of.
    """

    def require_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Raises what :meth:`merge` would raise for these adapters, of which the layer need not have all."""
        base_layers.require_mergeable(self.get_base_layer(), self._weight_shape)
        for name in adapter_names:
            if name in self.randlora_lambda:
                self._trained(name, torch.device("cpu"))

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

        Args:
            safe_merge: raise ``ValueError``, with nothing changed, if the merged weight is not finite.

        A weight that accelerate offloads is merged into where it is kept between calls, in memory: files stay as they
        are.

        Raises:
            TypeError: a weight that is no tensor, or of a dtype that updates cannot be added to. ValueError: a weight
                on the meta device, or one that the base layer does not simply multiply by.
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
        base, kept = self.get_base_layer(), self._unmerged_weight
        self.require_mergeable(names)
        if isinstance(kept, tuple) or quantized.is_quantized(base):
            self._merge_quantized(base, names, safe_merge)
            return
        weight = offload.read(base, "weight")
        require_dtype("the base weight's dtype", weight.dtype)
        with torch.no_grad():
            merged = sum((self.get_delta_weight(name).to(weight.device) for name in names), start=weight)
            merged = merged.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"merging {', '.join(names)} gives NaN or infinity in the weight; nothing was changed")
            if kept is None:
                self._unmerged_weight = weight.detach().cpu() if offload.hooks(base) else weight.detach().clone()
            _put(base, merged)
        self._merged_into = (base,)
        self.merged_adapters.extend(names)

    def _merge_quantized(self, base: nn.Module, names: list[str], safe_merge: bool) -> None:
        kept = self._unmerged_weight
        original = base.weight if kept is None else kept[0]
        with torch.no_grad():
            update = sum(self.get_delta_weight(name).to(original.device) for name in (*self.merged_adapters, *names))
            parameter, stands_for, loss = quantized.merged_parameter(base, update, original)
            if safe_merge and not torch.isfinite(stands_for).all():
                raise ValueError(f"merging {', '.join(names)} gives NaN or infinity in the weight; nothing was changed")
        before = quantized.replace_weight(base, parameter)
        if kept is None:
            self._unmerged_weight = (before,)
        self._merged_into = (base,)
        self.merged_adapters.extend(names)
        if loss is not None:
            warnings.warn(loss, stacklevel=3)

    def unmerge(self) -> None:
        """Give the base weight back, bit for bit as it was before the first :meth:`merge`.

        Raises:
            ValueError: the base layer is another one than at the merge, which has its weight.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base, kept = self.get_base_layer(), self._unmerged_weight
        if self._merged_into is not None and self._merged_into[0] is not base:
            raise ValueError(
                f"{', '.join(self.merged_adapters)} was merged into a base layer that has been replaced by another, a "
                f"{base_layers.name_of(base)}: it cannot be taken out of that"
            )
        if isinstance(kept, tuple):
            quantized.replace_weight(base, kept[0])
        else:
            offload.require_numbers(kept, "the base layer's weight as it was", "to give back")
            _put(base, kept)
        self._unmerged_weight = self._merged_into = None
        self.merged_adapters.clear()


def _put(base: nn.Module, value: Tensor) -> None:
    """Another value for an ordinary weight, wherever it is kept."""
    with torch.no_grad():
        if not offload.hooks(base):
            base.weight.copy_(value)
            return
        # What is brought in may be the very tensor that it is brought in from, which may be others' too.
        offload.write(base, "weight", value)
        if not base.weight.is_meta:
            base.weight.data = value.to(base.weight.device)
