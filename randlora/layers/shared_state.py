"""What the halves of :class:`randlora.RandLoraLayer` have of each other, declared for readers and type checkers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..bases.patterns import Pattern
from ..bases.random_bases import RandomBases
from .outputs import Rest

if TYPE_CHECKING:
    import torch

    class SharedState(nn.Module):
        """The attributes are set by ``RandLoraLayer._init_randlora``."""

        base_layer: nn.Module
        in_features: int
        out_features: int
        fan_in_fan_out: bool
        strategy: str
        weight_name: str
        num_experts: int | None
        r: dict[str, int]
        num_bases: dict[str, int]
        scaling: dict[str, float]
        bases: dict[str, RandomBases]
        randlora_lambda: nn.ParameterDict
        randlora_gamma: nn.ParameterDict
        merged_adapters: list[str]
        _modules: dict[str, Any]
        _unmerged_weight: Tensor | tuple[Any] | None  # tuples: nn.Module must not register what is in them
        _merged_into: tuple[nn.Module] | None
        active_adapters: Any  # a property
        _weight_shape: Any  # a property

        def get_base_layer(self) -> Any: ...
        def get_delta_weight(self, adapter: str) -> Tensor: ...
        def trained_parts(self) -> tuple[nn.ParameterDict, nn.ParameterDict]: ...
        def _delta(self, adapter: str, lam: Tensor, gamma: Tensor, device: torch.device) -> Tensor: ...
        def _require_mergeable(self, base: nn.Module, in_place: bool, numbers: bool) -> None: ...
        def _bases(self, adapter: str) -> RandomBases: ...
        def _check_adapter(self, adapter_name: str) -> None: ...
        def _held(self, adapter: str) -> tuple[Tensor, Tensor]: ...
        def _pattern(self, adapter: str, device: torch.device | None = None) -> tuple[Pattern, float] | None: ...
        def _product(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Rest]: ...
        def _trained(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]: ...
        def _trained_whole(self, adapter: str, device: torch.device) -> tuple[Tensor, Tensor]: ...

else:

    class SharedState:
        """Nothing while a program runs: the halves are mixed into a module that has all of it."""
