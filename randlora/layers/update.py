"""The update of one adapter: its bases and parameters as a call takes them, and what they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..bases.patterns import Pattern
from ..bases.random_bases import RandomBases
from ..distributed import zero3
from ..distributed.gathering import is_dtensor
from ..dtypes import at_least_fp32
from ..functional import delta_weight, flat_bases, sparse_delta_weight
from . import offload
from .shared_state import SharedState


class Update(SharedState):
    """The arithmetic half of :class:`randlora.RandLoraLayer`, whose attributes it uses."""

    @property
    def randlora_A(self) -> Mapping[str, Tensor]:
        return _Values(self.bases, "A")

    @property
    def randlora_B(self) -> Mapping[str, Tensor]:
        return _Values(self.bases, "B")

    def get_scaled_bases(self, adapter: str, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """The two factors that the input passes through in turn: ``F.linear(F.linear(x, first), second) * scaling``.

        ``in <= out``: the scaled base ``[n*r, in]`` and B ``[out, n*r]``; otherwise the transposes of B and of the
        scaled base. fp32 (fp64 for fp64 parameters), on `device` or that of the parameters.
        """
        self._check_adapter(adapter)
        S2, B2 = flat_bases(*self._update_arguments(adapter, device), self.in_features, self.out_features)
        return (S2, B2) if self.in_features <= self.out_features else (B2.T, S2.T)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``dW`` of one adapter in the weight's layout (``[out, in]``, or ``[in, out]`` where `fan_in_fan_out`).

        fp32 (fp64 for fp64 parameters), whatever the weight's dtype.
        """
        self._check_adapter(adapter)
        device = self._device(adapter)
        return self._delta(adapter, *self._trained_whole(adapter, device), device)

    def _delta(self, adapter: str, lam: Tensor, gamma: Tensor, device: torch.device) -> Tensor:
        """The same for this lambda ``[r, n]`` and gamma ``[n, min_dim]``."""
        dtype, scaling = at_least_fp32(lam.dtype), self.scaling[adapter]
        lam, gamma = lam.to(device, dtype), gamma.to(device, dtype)
        found = self._pattern(adapter, device)
        if found is None:
            A, B, factor = self._matrix_bases(adapter, dtype, device)
            update = delta_weight(A, B, lam, gamma, scaling * factor, self.in_features, self.out_features)
        else:
            update = sparse_delta_weight(*found, lam, gamma, scaling, self.in_features, self.out_features)
        return update.T if self.fan_in_fan_out else update

    def pattern(self, adapter: str) -> Pattern | None:
        """The packed bases of an adapter (:meth:`randlora.RandomBases.pattern`), or None for dense ones."""
        found = self._pattern(adapter)
        return None if found is None else found[0]

    def _bases(self, adapter: str) -> RandomBases:
        return self.bases[adapter]

    def _pattern(self, adapter: str, device: torch.device | None = None) -> tuple[Pattern, float] | None:
        device = self._device(adapter) if device is None else device
        return self._bases(adapter).pattern(min(self.in_features, self.out_features), device)

    def _tensors(self, adapter: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """A, B and the factor that their product lacks."""
        bases = self._bases(adapter)
        return *bases.tensors(dtype, device), bases.scale

    def _bases_for_call(
        self, adapter: str, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None, Pattern | None, float]:
        """A and B, or packed bases in their place, and the factor that their product lacks."""
        found = self._pattern(adapter, device)
        if found is not None:
            return None, None, *found
        A, B, factor = self._tensors(adapter, dtype, device)
        return A, B, None, factor

    def _matrix_bases(self, adapter: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
        """A, B and that factor, where a matrix is built outside of calls."""
        return self._tensors(adapter, dtype, device)

    def _update_arguments(
        self, adapter: str, device: torch.device | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        device = self._device(adapter) if device is None else torch.device(device)
        lam, gamma = self._trained_whole(adapter, device)
        dtype = at_least_fp32(lam.dtype)
        A, B, factor = self._matrix_bases(adapter, dtype, device)
        return A, B, lam.to(device, dtype), gamma.to(device, dtype), factor

    def _device(self, adapter: str) -> torch.device:
        """Where the adapter's numbers are, or would be in a call if they are offloaded."""
        return offload.device_of(self.randlora_lambda, self.randlora_lambda[adapter])

    def _held(self, adapter: str) -> tuple[Tensor, Tensor]:
        """lambda and gamma as they are between calls."""
        parts = self._modules
        return offload.held(parts["randlora_lambda"], adapter), offload.held(parts["randlora_gamma"], adapter)

    def _trained(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """lambda and gamma for a call on `device`: see :func:`randlora.layers.offload.trained`."""
        parts = self._modules
        return (
            offload.trained(parts["randlora_lambda"], adapter, "randlora_lambda", device),
            offload.trained(parts["randlora_gamma"], adapter, "randlora_gamma", device),
        )

    def _trained_whole(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """The same outside of calls, where neither DeepSpeed nor FSDP2 has gathered them."""
        lam, gamma = self._trained(adapter, device)
        for what, parameter in zip(("lambda", "gamma"), (lam, gamma), strict=True):
            zero3.require_whole(parameter, f"randlora_{what}[{adapter!r}]", "to build an update of")
            if is_dtensor(parameter):
                raise ValueError(
                    f"randlora_{what}[{adapter!r}] is spread over processes, by fully_shard for example, and whole in "
                    "calls of the model only: save the adapter and load it into a model that is not sharded"
                )
        return lam, gamma


class _Values(Mapping[str, Tensor]):
    """Adapter name -> A or B of its bases."""

    def __init__(self, bases: dict[str, RandomBases], which: str) -> None:
        self._bases, self._which = bases, which

    def __getitem__(self, adapter: str) -> Tensor:
        tensor: Tensor = getattr(self._bases[adapter], self._which)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._bases)

    def __len__(self) -> int:
        return len(self._bases)
