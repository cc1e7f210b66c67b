"""The adapter bookkeeping of one layer: which adapters it has, which are active, which are merged.

Names follow PEFT's ``RandLoraLayer`` and ``BaseTunerLayer``. Unlike there, every adapter keeps its own rank, number of
bases and bases, and merging keeps the base weight, so that unmerging restores it bit for bit.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..bases.definition import bases_for_full_rank
from ..bases.random_bases import RandomBases
from ..bases.shared import shared_bases
from ..checks import require_float, require_size
from ..distributed import zero3
from ..distributed.fsdp import is_sharded
from ..dtypes import at_least_fp32
from ..names import check_adapter_name
from ..undo import all_or_nothing
from . import initial, offload, sharded
from .linears import dtype_and_device
from .merging import Mergeable
from .mixed_batch import MixedBatch
from .update import Update

BaseTensors = Tensor | Mapping[str, Tensor] | None


class RandLoraLayer(Update, Mergeable, zero3.GatheredForCalls):
    """Mixin for a module that wraps ``base_layer`` and adds RandLoRA updates to it.

    Attributes (dicts are keyed by adapter name):
        randlora_lambda: ``[r, num_bases]`` parameters. randlora_gamma: ``[num_bases, min_dim]`` parameters.
        randlora_A, randlora_B: the bases in unit variance, read-only, not part of the state dict.
        bases: the :class:`~randlora.RandomBases` behind them.
        r, num_bases, randlora_alpha, scaling (alpha / r), randlora_dropout: settings.
        initial_gamma: what gamma starts with, and is reset to.

    ``fan_in_fan_out`` says that the base weight is ``[in, out]``, as in transformers' ``Conv1D``.
    """

    adapter_layer_names = ("randlora_lambda", "randlora_gamma")
    weight_name = "weight"  # of the base layer's parameter that is adapted
    num_experts: int | None = None  # a number: that parameter has so many weights, and lambda and gamma have as many
    other_param_names: tuple[str, ...] = (
        "randlora_A",
        "randlora_B",
        "randlora_dropout",
        "r",
        "num_bases",
        "randlora_alpha",
        "scaling",
    )

    def _init_randlora(
        self, base_layer: nn.Module | None, in_features: int, out_features: int, fan_in_fan_out: bool = False
    ) -> None:
        if base_layer is not None:  # None: it is not a part of this module
            self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.fan_in_fan_out = fan_in_fan_out
        self.r: dict[str, int] = {}
        self.num_bases: dict[str, int] = {}
        self.randlora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.initial_gamma: dict[str, float] = {}
        self.bases: dict[str, RandomBases] = {}
        self.randlora_dropout = nn.ModuleDict()
        self.randlora_lambda = nn.ParameterDict()
        self.randlora_gamma = nn.ParameterDict()
        self.merged_adapters: list[str] = []
        self._active_adapters: list[str] = []
        self._disable_adapters = self._inference_mode = False
        self.mixed_batch: MixedBatch | None = None
        # Tuples: nn.Module must not register what is in them.
        self._unmerged_weight = self._merged_into = None

    # ---- adding and removing adapters ----

    def update_layer(
        self,
        adapter_name: str,
        randlora_A: BaseTensors = None,
        randlora_B: BaseTensors = None,
        r: int = 32,
        randlora_alpha: initial.Alpha = 640,
        randlora_dropout: float = 0.0,
        init_weights: bool = True,
        *,
        bases: RandomBases | None = None,
        num_bases: int | None = None,
    ) -> None:
        """Add the adapter `adapter_name`; it becomes active and trainable if it is the layer's first.

        In a layer that FSDP2 shards it becomes active only: its gradients would not be reduced. Arguments as for
        :class:`randlora.Linear`. Raises before anything is changed.
        """
        check_adapter_name(adapter_name)
        if adapter_name in self.randlora_lambda:
            raise ValueError(f"this layer already has an adapter named {adapter_name!r}: delete it first")
        r = require_size("r", r)
        m, M = min(self.in_features, self.out_features), max(self.in_features, self.out_features)
        n = bases_for_full_rank(m, r) if num_bases is None else require_size("num_bases", num_bases)
        alpha, gamma_0 = initial.start(randlora_alpha, r, initial.Shape(self.in_features, self.out_features, n))
        dropout = require_float("randlora_dropout", randlora_dropout, 0.0, 1.0)
        if init_weights not in (True, False):
            raise TypeError(f"init_weights must be True or False, got {init_weights!r}")
        bases = self._choose_bases(adapter_name, randlora_A, randlora_B, bases, r)
        bases.require(M, m, n)

        dtype, device = self._parameters_like()
        with all_or_nothing(self):
            self.r[adapter_name], self.num_bases[adapter_name], self.bases[adapter_name] = r, n, bases
            self.randlora_alpha[adapter_name], self.scaling[adapter_name] = alpha, alpha / r
            self.initial_gamma[adapter_name] = gamma_0
            self.randlora_dropout[adapter_name] = nn.Dropout(dropout) if dropout else nn.Identity()
            lam = torch.randn(self._of_experts(r, n), dtype=dtype, device=device)
            gamma = torch.full(self._of_experts(n, m), 1 / M, dtype=dtype, device=device)
            self.randlora_lambda[adapter_name], self.randlora_gamma[adapter_name] = map(nn.Parameter, (lam, gamma))
            if init_weights:
                self.reset_randlora_parameters(adapter_name)
            frozen = self._inference_mode or (not self._active_adapters and is_sharded(self))
            self.set_adapter(self._active_adapters or [adapter_name], frozen)

    def _parameters_like(self) -> tuple[torch.dtype, torch.device]:
        """What parameters that go with the base layer are: on meta only if the layer has no numbers itself."""
        dtype, device = self.compute_dtype_and_device()
        return at_least_fp32(dtype), device

    def compute_dtype_and_device(self) -> tuple[torch.dtype, torch.device]:
        """What the layer computes in outside of autocast, and where; fp32 where the base layer does not tell."""
        dtype, device = dtype_and_device(self.get_base_layer(), self.weight_name)
        if device is None:  # PyTorch's own quantised layers have no tensors
            first = next(iter(self.randlora_lambda.values()), None)
            device = torch.device("cpu") if first is None else first.device
        return torch.float32 if dtype is None else dtype, device

    def _choose_bases(
        self, adapter_name: str, A: BaseTensors, B: BaseTensors, bases: RandomBases | None, r: int
    ) -> RandomBases:
        if (A is None) != (B is None):
            raise ValueError(
                "randlora_A and randlora_B must be given together, got only randlora_" + ("B" if A is None else "A")
            )
        if A is not None and bases is not None:
            raise ValueError("give either randlora_A and randlora_B or bases, not both")
        if bases is None:
            if A is None or B is None:
                return shared_bases(r)
            bases = RandomBases.from_tensors(
                _of_adapter("randlora_A", A, adapter_name), _of_adapter("randlora_B", B, adapter_name)
            )
        if not isinstance(bases, RandomBases):
            raise TypeError(f"bases must be randlora.RandomBases, got {type(bases).__name__}")
        if bases.r != r:
            raise ValueError(f"adapter {adapter_name!r} has r = {r}, but its bases have r = {bases.r}")
        return bases

    def reset_randlora_parameters(self, adapter_name: str) -> None:
        """Lambda zero and gamma as it starts, so that the update is zero.

        That is PEFT's ``1 / max(num_bases, min_dim)``, also of an adapter that was loaded from a file, or what the rule
        gave to one made with ``randlora_alpha="auto"``.
        """
        self._check_adapter(adapter_name)
        for part, parameters in zip(self.adapter_layer_names, self.trained_parts(), strict=True):
            zero3.require_whole(parameters[adapter_name], f"{part}[{adapter_name!r}]", "to reset", writing=True)
        offload.fill(self.randlora_lambda, adapter_name, 0.0)
        offload.fill(self.randlora_gamma, adapter_name, self.initial_gamma[adapter_name])

    def reset_parameters(self) -> None:
        """torch's way to fill modules after ``to_empty``: all adapters start anew, the base layer is not touched."""
        for adapter_name in self.randlora_lambda:
            self.reset_randlora_parameters(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the only active one, the first that is left becomes active (with a warning)."""
        self._check_adapter(adapter_name)
        sharded.check_deleted(self.trained_parts(), adapter_name)
        if adapter_name in self.merged_adapters:
            raise ValueError(f"adapter {adapter_name!r} is merged into the base weight: call unmerge() first")
        active, left = self._active_adapters, [name for name in self._active_adapters if name != adapter_name]
        others = [name for name in self.randlora_lambda if name != adapter_name]
        if active == [adapter_name] and others:
            left = others[:1]
            warnings.warn(f"the active adapter {adapter_name!r} was deleted; {left[0]!r} is active now", stacklevel=2)
        with all_or_nothing(self):
            for parameters in self.trained_parts():
                offload.forget(parameters, adapter_name)
            for kept in (
                self.r,
                self.num_bases,
                self.randlora_alpha,
                self.scaling,
                self.initial_gamma,
                self.bases,
                self.randlora_dropout,
                self.randlora_lambda,
                self.randlora_gamma,
            ):
                del kept[adapter_name]
            if adapter_name in active:
                self.set_adapter(left, self._inference_mode)

    # ---- which adapters act ----

    @property
    def active_adapters(self) -> list[str]:
        return list(self._active_adapters)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or the list of them if there are several (as in PEFT)."""
        return self._active_adapters[0] if len(self._active_adapters) == 1 else self.active_adapters

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate these adapters; they become trainable (not with `inference_mode`), all others frozen."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(dict.fromkeys(adapter_names))
        for name in names:
            self._check_adapter(name)
        if not inference_mode:
            self.check_trained(names)
        self._active_adapters, self._inference_mode = names, inference_mode
        frozen = inference_mode or self._disable_adapters
        for parameters in (self.randlora_lambda, self.randlora_gamma):
            for name, parameter in parameters.items():
                parameter.requires_grad_(name in names and not frozen)

    def dropout_of(self, adapter_name: str) -> float:
        """The probability of the dropout that takes place in a call now."""
        dropout = self._modules["randlora_dropout"]._modules[adapter_name]
        return dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0

    def check_trained(self, adapter_names: Sequence[str]) -> None:
        """Raises ``ValueError`` for adapters that cannot be trained, as FSDP2 does not know them."""
        sharded.check_trained(self, self.trained_parts(), adapter_names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off. Off: they are frozen, and merged ones leave the weight at the next call."""
        self._disable_adapters = not enabled
        self.set_adapter(self._active_adapters, self._inference_mode)

    @property
    def inference_mode(self) -> bool:
        """Whether the active adapters were activated without becoming trainable."""
        return self._inference_mode

    @property
    def disable_adapters(self) -> bool:
        return self._disable_adapters

    def mixable_adapters(self) -> list[str]:
        """See :class:`randlora.layers.mixed_batch.Mixable`."""
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first")
        return list(self.randlora_lambda)

    # ---- small things ----

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def trained_parts(self) -> tuple[nn.ParameterDict, nn.ParameterDict]:
        return self.randlora_lambda, self.randlora_gamma

    def _of_experts(self, *shape: int) -> tuple[int, ...]:
        return shape if self.num_experts is None else (self.num_experts, *shape)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        shape = self.out_features, self.in_features
        return self._of_experts(*(shape[::-1] if self.fan_in_fan_out else shape))

    def _description(self) -> str:
        state = [f"in_features={self.in_features}, out_features={self.out_features}, active={self._active_adapters}"]
        if self.merged:
            state.append(f"merged={self.merged_adapters}")
        if self.disable_adapters:
            state.append("disabled")
        adapters = (
            f"{name}: r={self.r[name]}, num_bases={self.num_bases[name]}, alpha={self.randlora_alpha[name]:g}, "
            f"kind={self.bases[name].kind}"
            for name in self.randlora_lambda
        )
        return "\n".join([", ".join(state), *adapters])

    def _check_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.randlora_lambda:
            known = ", ".join(self.randlora_lambda) or "none"
            raise ValueError(f"this layer has no adapter named {adapter_name!r}; it has: {known}")


def _of_adapter(name: str, tensors: Tensor | Mapping[str, Tensor], adapter_name: str) -> Tensor:
    if isinstance(tensors, Tensor):
        return tensors
    if not isinstance(tensors, Mapping) and not hasattr(tensors, "keys"):  # PEFT's BufferDict is no Mapping
        raise TypeError(
            f"{name} must be a tensor or a mapping from adapter names to tensors, got {type(tensors).__name__}"
        )
    if adapter_name not in tensors:
        raise ValueError(f"{name} has no entry for adapter {adapter_name!r}; it has: {', '.join(tensors) or 'none'}")
    return tensors[adapter_name]
