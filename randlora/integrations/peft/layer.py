"""PEFT's RandLoRA layer, computed by randlora: PEFT keeps the adapters, randlora does the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import randlora as peft_randlora
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ...bases.random_bases import RandomBases
from ...layers import offload
from ...layers.base_layer import first_argument
from ...layers.linear import Linear
from ...layers.mixed_batch import MixedBatch
from ...layers.ordinary import has_weight_method, tensor_weight
from ...layers.outputs import apart, together
from ...layers.randlora_layer import RandLoraLayer
from .bases import RANK_AXIS, Bases, Pair, is_8_bit
from .wrappers import Trainability


class AcceleratedLinear(peft_randlora.Linear, Linear):
    """What PEFT's RandLoRA layer becomes, on float and on quantised base layers alike (see ``conversion.convert``).

    PEFT's classes come first: what adapters there are, which act and what is trained is theirs. The methods below put
    randlora's arithmetic in the place of PEFT's. Attributes of PEFT's layer keep their meaning, but ``num_bases`` is a
    dict, as adapters may differ in it.
    """

    other_param_names = (*peft_randlora.RandLoraLayer.other_param_names, "num_bases")

    strategy, workspace = "auto", 0
    mixed_batch: MixedBatch | None = None
    _unmerged_weight = _merged_into = None

    # ---- the arithmetic ----

    get_scaled_bases = RandLoraLayer.get_scaled_bases
    get_delta_weight = RandLoraLayer.get_delta_weight
    unmerge = RandLoraLayer.unmerge

    def forward(self, x: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]``; in x's dtype, as PEFT gives it."""
        if x is None:
            x = first_argument(self.base_layer, kwargs)
        result, rest = apart(Linear.forward(self, x, *args, **kwargs))
        return together(result.to(x.dtype) if isinstance(result, Tensor) else result, rest)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """PEFT's ``merge``, in fp32, rounded once; the weight as it was is kept for :meth:`unmerge`."""
        if adapter_names is not None and not adapter_names:
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.randlora_lambda]
        if names:
            RandLoraLayer.merge(self, safe_merge, names)

    def _matrix_bases(self, adapter: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
        # In the dtype they are held in: a matrix is built once in a while, and an fp32 copy of them would stay.
        return *self._bases(adapter).tensors(device=device), 1.0

    def _pair(self, adapter: str) -> Pair:
        return self.randlora_A._pair(adapter)

    def _bases(self, adapter: str) -> RandomBases:
        return self._pair(adapter).bases

    def _tensors(self, adapter: str, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, float]:
        return self._pair(adapter).tensors(dtype, device)

    @property
    def bases(self) -> Mapping[str, RandomBases]:
        return _BasesOf(self)

    @property
    def _active_adapters(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.randlora_lambda]

    def __repr__(self) -> str:
        return nn.Module.__repr__(self)

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={self.r[name]}" for name in self.randlora_lambda)
        return f"in_features={self.in_features}, out_features={self.out_features}, {adapters}"

    # ---- the adapters' parameters ----

    def enable_adapters(self, enabled: bool) -> None:
        """PEFT's ``enable_adapters``; what was frozen before the adapters were disabled stays frozen."""
        if not enabled:
            Trainability.note(self)
            super().enable_adapters(enabled)
            return
        with Trainability.kept(self):
            super().enable_adapters(enabled)

    # ---- the bases, which belong to the model ----

    @property
    def randlora_A(self) -> Bases:
        return self._container("randlora_A")

    @property
    def randlora_B(self) -> Bases:
        return self._container("randlora_B")

    def _container(self, kind: str) -> Bases:
        # PEFT's update_layer makes it a child; refer_to_bases() undoes that.
        return self._modules[kind] if kind in self._modules else self.__dict__["_containers"][kind]

    def update_layer(
        self, adapter_name: str, randlora_A: BufferDict, randlora_B: BufferDict, *args: Any, **kwargs: Any
    ) -> None:
        """PEFT's ``update_layer``. The layer's other adapters come along into these containers of bases."""
        if not isinstance(randlora_A, Bases):  # of PEFT's own tuner, after disable()
            Bases._make_pair(randlora_A, randlora_B)
        self._carry_over(adapter_name, randlora_A, randlora_B)
        super().update_layer(adapter_name, randlora_A, randlora_B, *args, **kwargs)
        self.refer_to_bases()

    def _carry_over(self, adapter_name: str, *stores: Bases) -> None:
        for store in stores:
            held = self.__dict__.get("_containers", {}).get(store._kind, store)
            for name in self.randlora_lambda if held is not store else ():
                if name == adapter_name:
                    continue
                if name not in store:
                    store.persistent = held._is_persistent(name)
                    store[name] = held[name]
                elif store[name] is not held[name] and not torch.equal(store[name], held[name]):
                    raise ValueError(
                        f"adapter {name!r} was injected more than once, with other bases: delete it before another one "
                        "is added"
                    )

    def refer_to_bases(self) -> None:
        """Keep the containers of bases without being their parent, and ``num_bases`` per adapter."""
        for kind in RANK_AXIS:
            if kind in self._modules:
                self.__dict__.setdefault("_containers", {})[kind] = self._modules.pop(kind)
        self.num_bases = {adapter: lam.shape[1] for adapter, lam in self.randlora_lambda.items()}

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if has_weight_method(self.get_base_layer()):
            return  # quantised by PyTorch after it was adapted: it has no device and no dtype
        # PEFT casts a new adapter's bases here, from update_layer, and that decides their values. Later it must not.
        new = "randlora_A" in self._modules
        if not new:
            self.other_param_names = tuple(name for name in type(self).other_param_names if name not in RANK_AXIS)
        parameters = [(held, held[adapter_name]) for held in (self.randlora_lambda, self.randlora_gamma)]
        try:
            with seen_where_it_computes(self.get_base_layer()):
                super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        finally:
            self.__dict__.pop("other_param_names", None)
        for held, before in parameters:
            if is_8_bit(moved := held[adapter_name]):
                value = before.detach().to(moved.device, torch.float32)
                held[adapter_name] = nn.Parameter(value, requires_grad=before.requires_grad)
        if new:
            self.follow_to_meta(adapter_name)

    def follow_to_meta(self, adapter_name: str) -> None:
        """New parameters of a layer that has no numbers have none either."""
        weight = tensor_weight(self.get_base_layer())
        if weight is not None and offload.device_of(self.get_base_layer(), weight).type == "meta":
            for parameters in (self.randlora_lambda, self.randlora_gamma):
                parameters[adapter_name] = nn.Parameter(parameters[adapter_name].to("meta"))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Takes the copies of the bases that PEFT writes for every layer."""
        assign = local_metadata.get("assign_to_params_buffers", False)
        for kind in RANK_AXIS:
            for adapter in self.randlora_lambda:
                if f"{prefix}randlora_lambda.{adapter}" not in state_dict:
                    continue
                for key in (f"{prefix}{kind}.{adapter}", prefix + kind):  # PEFT leaves the name out where it has no use
                    tensor = state_dict.pop(key, None)
                    if tensor is not None and not getattr(self, kind)._take(adapter, tensor, assign):
                        errors.append(
                            f"size mismatch for {key}: copying a base of shape {list(tensor.shape)} from checkpoint, "
                            f"needed is {list(getattr(self, kind)[adapter].shape)} or a larger one of the same rank."
                        )
        if not assign:
            self._make_room(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def _make_room(self, state_dict: dict, prefix: str) -> None:
        """torch would not copy numbers into parameters on the meta device, and they would be lost."""
        for part in self.adapter_layer_names:
            parameters = getattr(self, part)
            for adapter, parameter in parameters.items():
                tensor = state_dict.get(f"{prefix}{part}.{adapter}")
                if tensor is not None and parameter.is_meta and not tensor.is_meta and not offload.hooks(parameters):
                    room = torch.empty_like(parameter, device=tensor.device)
                    parameters[adapter] = nn.Parameter(room, parameter.requires_grad)

    def _orphans(self) -> Iterator[tuple[str, Bases]]:
        """Containers that no tuner saves, moves or shows: then the layers do, as in PEFT."""
        for kind, store in self.__dict__.get("_containers", {}).items():
            if not store._is_owned():
                yield kind, store

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        yield from super().named_children()
        yield from self._orphans()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for kind, store in self._orphans():
            for adapter, tensor in store.items():
                if adapter not in self.randlora_lambda:  # no layer without it takes it when loading
                    continue
                name = f"{kind}.{adapter}"
                there = [found.data_ptr() for key, found in destination.items() if key.endswith(name)]
                if store._is_persistent(adapter) and tensor.data_ptr() not in there:
                    destination[prefix + name] = tensor if keep_vars else tensor.detach()  # the first layer will do


class _BasesOf(Mapping[str, RandomBases]):
    """Adapter name -> bases, of the adapters that the layer has at the time."""

    def __init__(self, layer: AcceleratedLinear) -> None:
        self._layer = layer

    def __getitem__(self, adapter: str) -> RandomBases:
        if adapter not in self._layer.randlora_lambda:
            raise KeyError(adapter)
        return self._layer._bases(adapter)

    def __iter__(self) -> Iterator[str]:
        return iter(self._layer.randlora_lambda)

    def __len__(self) -> int:
        return len(self._layer.randlora_lambda)


# Models are printed, and scripts tell layers apart, by the name that PEFT's class has.
AcceleratedLinear.__name__ = peft_randlora.Linear.__name__


def initialise_anew(layer: AcceleratedLinear, adapter: str, init_weights: bool) -> None:
    """Undo PEFT's rounding of a new adapter's parameters to 8 bits, where the weight is kept in 8 bits between calls.

    PEFT has them in fp32 afterwards, but gamma, ``1 / 4096`` for one, may have become zero and is never trained then.
    """
    for held in (layer.randlora_lambda, layer.randlora_gamma):
        if is_8_bit(parameter := held[adapter]):
            held[adapter] = nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
            if held is layer.randlora_gamma:
                with torch.no_grad():
                    largest = max(parameter.shape if init_weights else (layer.in_features, layer.out_features))
                    held[adapter].fill_(1 / largest)


@contextmanager
def seen_where_it_computes(base_layer: Any) -> Iterator[None]:
    """While this lasts, PEFT, which moves adapters to the weight's device, finds no weight on the meta device.

    It is where an offloaded layer computes; on the CPU for a layer that has no numbers, as the bases have some.
    """
    weight = tensor_weight(base_layer)
    if weight is None or not weight.is_meta or "weight" not in base_layer._parameters:
        yield
        return
    device = offload.execution_device(base_layer) or torch.device("cpu")
    stand_in = torch.empty((), dtype=weight.dtype, device=device).expand(weight.shape)
    base_layer._parameters["weight"] = nn.Parameter(stand_in, requires_grad=False)
    try:
        yield
    finally:
        base_layer._parameters["weight"] = weight
