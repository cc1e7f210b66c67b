"""The merged plain model as names and tensors, without merging: the adapted model stays as it is.

A skeleton of the plain model is made first, which shares all tensors with the adapted one but those that merging would
change. These are on the meta device there, and each has a function that makes its numbers. torch's own ``state_dict``
of the skeleton then says which names there are, and in which order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..distributed import zero3
from ..distributed.fsdp import hold_parts, is_sharded
from ..distributed.gathering import whole
from ..layers import offload, quantized
from ..layers.attention import PROJECTIONS, MultiheadAttention
from ..layers.experts import Experts
from ..layers.merging import Mergeable, added
from ..layers.modules_to_save import ModuleToSave
from ..layers.quantized.fp8 import is_fp8
from ..layers.randlora_layer import RandLoraLayer
from ..names import plain_name
from . import injection
from .original_names import Original

Update = Callable[[str], Tensor | None]


@dataclass(frozen=True)
class Part:
    """A tensor of the merged model.

    ``like`` has its shape and dtype: it itself unless it is ``computed``. ``update(adapter)`` is what one adapter adds
    to it, None where it adds nothing; there is none where no adapter does.
    """

    like: Tensor
    make: Callable[[], Tensor]
    update: Update | None = None
    computed: bool = False


def merged_tensors(
    model: nn.Module, names: Sequence[str], safe_merge: bool, dequantize: bool | torch.dtype, original_names: bool
) -> Iterator[tuple[str, Tensor]]:
    """See :meth:`randlora.RandLoraModel.merged_tensors`; `model` is the one inside."""
    parts = parts_of(model, names, safe_merge, dequantize)
    if original_names:
        first = {id(part.like): name for name, part in reversed(parts.items())}
        # What is tied comes once, and no file knows of torch.compile.
        parts = {plain_name(name): part for name, part in parts.items() if first[id(part.like)] == name}
        return Original(model, {name: part.like for name, part in parts.items()}).tensors(each(parts))
    return each(parts)


def each(parts: dict[str, Part]) -> Iterator[tuple[str, Tensor]]:
    for name, part in parts.items():
        yield name, part.make()


def parts_of(
    model: nn.Module,
    names: Sequence[str],
    safe_merge: bool = False,
    dequantize: bool | torch.dtype = False,
    numbers: bool = True,
) -> dict[str, Part]:
    """The tensors of the merged model by their names in its state dict, in its order.

    Args:
        numbers: False for a model on the meta device, of which only updates and what is not on meta can be used.

    Raises:
        ValueError, TypeError: what cannot be merged, or has no numbers.
    """
    hold_parts(model.modules())
    skeleton = Skeleton(list(names), safe_merge, _dtype(model, dequantize), numbers)
    injection.to_merge(model, names, in_place=False, numbers=numbers)
    plain = skeleton.of(model)
    owners = {
        id(tensor): (module, name)
        for module in model.modules()
        if offload.hooks(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    }
    found = {}
    for name, tensor in plain.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):  # others are states that a module makes up, which no server knows
            owner = owners.get(id(tensor))
            if numbers and tensor.is_meta and owner is None and id(tensor) not in skeleton.parts:
                offload.require_numbers(tensor, name, "to merge or to send")
            found[name] = skeleton.parts.get(id(tensor)) or Part(tensor, _AsItIs(tensor, owner))
    return found


def _dtype(model: Any, dequantize: bool | torch.dtype) -> torch.dtype | None:
    """Of quantised weights as numbers; None where these are not wanted."""
    if isinstance(dequantize, torch.dtype):
        if not dequantize.is_floating_point:
            raise ValueError(f"dequantize must be a bool or a floating dtype, got {dequantize}")
        return dequantize
    if not isinstance(dequantize, bool):
        raise TypeError(f"dequantize must be a bool or a floating dtype, got {type(dequantize).__name__}")
    if not dequantize:
        return None
    config = getattr(model, "config", None)
    said = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)  # the first since transformers 4.56
    held = (p.dtype for p in model.parameters() if p.dtype in (torch.float32, torch.bfloat16, torch.float16))
    return said if isinstance(said, torch.dtype) else next(held, torch.float32)


class _AsItIs:
    """A tensor that merging does not change: itself, unless it must be brought in or put together."""

    def __init__(self, tensor: Tensor, owner: tuple[nn.Module, str] | None = None) -> None:
        self.tensor, self.owner = tensor, owner

    def __call__(self) -> Tensor:
        tensor = self.tensor
        with torch.no_grad(), zero3.gathered([tensor]):
            value = whole(offload.read(*self.owner) if self.owner is not None else tensor).detach()
            return value.clone() if zero3.is_parameter(tensor) else value


class Skeleton:
    """Makes plain modules that share what they can with the adapted ones; ``parts`` by the id of their meta tensors."""

    def __init__(self, names: list[str], safe_merge: bool, dtype: torch.dtype | None, numbers: bool) -> None:
        self.names, self.safe_merge, self.dtype, self.numbers = names, safe_merge, dtype, numbers
        self.parts: dict[int, Part] = {}
        self._made: dict[int, nn.Module] = {}
        self._alive: list[Any] = []  # ids are those of living objects only

    def of(self, module: nn.Module) -> nn.Module:
        """What stands in the place of `module` in the merged model; `module` itself if nothing in it is adapted."""
        if id(module) not in self._made:
            self._made[id(module)] = self._make(module)
        return self._made[id(module)]

    def _make(self, module: Any) -> nn.Module:
        if isinstance(module, MultiheadAttention):
            return self._attention(module)
        if isinstance(module, Experts):
            layers: Any = module.adapted()
            return self._plain_base(module.base_layer, layers)
        if isinstance(module, RandLoraLayer):
            return self._plain_base(module.get_base_layer(), [module])
        if isinstance(module, ModuleToSave):
            chosen = next((name for name in self.names if name in module.modules_to_save), None)
            return self.of(module.original_module if chosen is None else module.modules_to_save[chosen])
        if quantized.is_quantized(module):
            return self._quantized(module, None)
        inside = {name: child if child is None else self.of(child) for name, child in module._modules.items()}
        changed = any(inside[name] is not child for name, child in module._modules.items())
        return _twin(module, _modules=inside) if changed else cast(nn.Module, module)

    def _plain_base(self, base: Any, layers: list[RandLoraLayer]) -> nn.Module:
        if any(layer._is_quantized() for layer in layers):
            return self._quantized(base, layers[0])
        held = {"_parameters": dict(base._parameters), "_buffers": dict(base._buffers)}
        for layer in layers:
            if any(name in layer.randlora_lambda for name in self.names):
                place = next(part for part in held.values() if layer.weight_name in part)
                place[layer.weight_name] = self._placeholder(
                    place[layer.weight_name], self._maker(layer), functools.partial(_update_of, layer)
                )
        return _twin(base, **held)

    def _maker(self, layer: Mergeable) -> Callable[[], Tensor]:
        names = [name for name in self.names if name in layer.randlora_lambda]
        # Not a function that refers to the skeleton, which refers to it: both would wait for the garbage collector.
        safe_merge = self.safe_merge
        return lambda: layer.merged_weight(names, safe_merge)

    def _placeholder(
        self, like: Tensor, make: Callable[[], Tensor], update: Update | None = None, dtype: Any = None
    ) -> nn.Parameter:
        shape = zero3.shape_of(like)
        tensor = nn.Parameter(torch.empty(shape, dtype=dtype or like.dtype, device="meta"), requires_grad=False)
        self.parts[id(tensor)] = Part(tensor, make, update, True)
        self._alive.append(tensor)
        return tensor

    # ---- torch's attention ----

    def _attention(self, attention: MultiheadAttention) -> nn.Module:
        weights = {f"{name}_weight": [name] for name in PROJECTIONS[:3]}
        weights |= {"in_proj_weight": list(PROJECTIONS[:3]), "out_proj.weight": ["out_proj"]}

        makers = {name: self._weight_of(getattr(attention, name)) for name in PROJECTIONS}

        def update(path: str) -> Update | None:
            layers = [getattr(attention, name) for name in weights.get(path, ())]
            if not any(isinstance(layer, RandLoraLayer) for layer in layers):
                return None
            return functools.partial(_update_of_all, layers)

        def value(path: str) -> Tensor:
            if path in weights:
                parts = [makers[name]() for name in weights[path]]
                return torch.cat(parts) if path == "in_proj_weight" else parts[0]
            if path == "in_proj_bias":
                return torch.cat([_AsItIs(getattr(attention, name).bias)() for name in PROJECTIONS[:3]])
            return _AsItIs(attention.out_proj.bias if path == "out_proj.bias" else getattr(attention, path))()

        def like(path: str) -> Tensor:
            size, first = attention.embed_dim, attention.q_proj.weight
            shapes = {"in_proj_weight": (3 * size, size), "in_proj_bias": (3 * size,), "out_proj.bias": (size,)}
            sizes = {"q_proj_weight": size, "k_proj_weight": attention.kdim, "v_proj_weight": attention.vdim}
            if path in ("bias_k", "bias_v"):
                shape: Any = getattr(attention, path).shape
            else:
                shape = shapes.get(path, (size, sizes.get(path, size)))
            return torch.empty(shape, dtype=first.dtype, device="meta")

        plain = attention.unwrapped_with(like)
        for path, parameter in list(plain.named_parameters()):
            owner: Any = plain.out_proj if path.startswith("out_proj.") else plain
            placeholder = self._placeholder(parameter, functools.partial(value, path), update(path))
            owner._parameters[path.rpartition(".")[2]] = placeholder
        return plain

    def _weight_of(self, layer: Any) -> Callable[[], Tensor]:
        if isinstance(layer, RandLoraLayer):
            return self._maker(layer)
        return lambda: _AsItIs(layer.weight, (layer, "weight") if offload.hooks(layer) else None)()

    # ---- quantised layers ----

    def _quantized(self, base: Any, layer: RandLoraLayer | None) -> nn.Module:
        if self.dtype is None:
            raise ValueError(
                f"the model has quantised layers, such as a {type(base).__name__}, whose weights are no plain numbers: "
                "give dequantize=True for what they stand for, with the updates added"
            )
        if offload.hooks(base) or is_sharded(base):
            raise ValueError(
                f"a quantised weight, such as that of a {type(base).__name__}, can be read neither while it is "
                f"offloaded ({offload.REAL_AGAIN} brings it back) nor while FSDP2 shards it"
            )

        chosen = [] if layer is None else [n for n in self.names if n in layer.randlora_lambda]
        dtype, safe_merge = self.dtype, self.safe_merge

        def make() -> Tensor:
            kept = None if layer is None else layer._unmerged_weight
            held = kept[0] if isinstance(kept, tuple) else None
            names = chosen
            if layer is not None:
                for name in names:
                    layer._check_adapter(name)
                merged = layer.merged_adapters
                names = [*(merged if held is not None else ()), *(n for n in names if n not in merged)]
            with torch.no_grad():
                weight = quantized.dequantize(base, held)
                updates = (layer.get_delta_weight(name).to(weight.device) for name in names) if layer else ()
                value = added(weight, updates).to(dtype)
                if safe_merge and names and not torch.isfinite(value).all():
                    raise ValueError(f"NaNs detected in the merged weights of {', '.join(names)}; nothing was changed")
                return value

        plain = nn.Module()
        shape = torch.empty(quantized.require_kind(base).shape(base, quantized.held_by(base)), device="meta")
        plain.register_parameter("weight", self._placeholder(shape, make, dtype=self.dtype))
        bias = getattr(base, "bias", None)
        if isinstance(bias, Tensor) and is_fp8(bias.dtype):  # cast for every call, as the weight is
            bias = self._placeholder(bias, functools.partial(bias.detach().to, self.dtype), dtype=self.dtype)
        if isinstance(bias, nn.Parameter):
            plain.register_parameter("bias", bias)
        elif isinstance(bias, Tensor):
            plain.register_buffer("bias", bias)
        return plain


def _update_of(layer: Any, adapter: str) -> Tensor | None:
    acts = isinstance(layer, RandLoraLayer) and adapter in layer.randlora_lambda
    return layer.get_delta_weight(adapter) if acts else None


def _update_of_all(layers: list[Any], adapter: str) -> Tensor | None:
    """Of weights that are one tensor, with zeros where the adapter adds nothing."""
    parts = [_update_of(layer, adapter) for layer in layers]
    if all(part is None for part in parts):
        return None
    shapes = [(layer.out_features, layer.in_features) for layer in layers]
    return torch.cat([torch.zeros(shape) if p is None else p for p, shape in zip(parts, shapes, strict=True)])


def _twin(module: Any, **changed: dict[str, Any]) -> nn.Module:
    """Another module of the same class that shares all attributes but those `changed`."""
    twin: nn.Module = object.__new__(type(module))
    vars(twin).update(vars(module), **changed)
    return twin
