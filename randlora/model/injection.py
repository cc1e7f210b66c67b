"""Putting a planned adapter into a model, and taking adapters out again, merged into the weights or not."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

from torch import nn

from ..distributed.fsdp import is_sharded
from ..layers.attention import MultiheadAttention, disable_fast_path, restore_fast_path
from ..layers.attention_parts import require_unsharded
from ..layers.experts import Experts
from ..layers.linear import Linear
from ..layers.modules_to_save import ModuleToSave
from ..layers.randlora_layer import RandLoraLayer
from ..layers.unmerging import merged_or_not
from ..names import check_adapter_name
from ..undo import all_or_nothing
from . import ties
from .adapter_plan import Plan
from .parts import adapted_layers, saved_modules


def apply(model: nn.Module, plan: Plan, adapter_name: str) -> None:
    """Wrap the targets, or add the adapter to those that are wrapped already. Callers undo what a failure leaves."""
    config = plan.config
    settings: dict[str, Any] = {
        "r": config.r,
        "randlora_alpha": plan.alpha,
        "randlora_dropout": config.randlora_dropout,
        "init_weights": config.init_weights,
        "bases": plan.bases,
        "num_bases": config.num_bases,
    }
    _check_sharded(model, plan)
    places = Places(model)
    module: Any
    for name, module in plan.targets.items():
        parent, _, leaf = name.rpartition(".")
        attention = model.get_submodule(parent)
        if isinstance(module, RandLoraLayer):
            module.update_layer(adapter_name, **settings)
        elif isinstance(module, MultiheadAttention):
            module.add_adapter(adapter_name, strategy=config.strategy, **settings)
        elif isinstance(attention, MultiheadAttention):
            attention.add_adapter(adapter_name, projections=(leaf,), strategy=config.strategy, **settings)
        elif isinstance(attention, nn.MultiheadAttention):
            wrapped = MultiheadAttention(
                attention, adapter_name, projections=(leaf,), strategy=config.strategy, **settings
            )
            places.put(attention, wrapped)
        elif isinstance(module, nn.MultiheadAttention):
            places.put(module, MultiheadAttention(module, adapter_name, strategy=config.strategy, **settings))
        else:
            places.put(module, Linear(module, adapter_name, strategy=config.strategy, **settings))
    for name, parameters in plan.experts.items():
        module = model.get_submodule(name)
        if isinstance(module, Experts):
            module.add_adapter(adapter_name, parameters, config.strategy, **settings)
        else:
            experts = Experts(module, adapter_name, parameters=parameters, strategy=config.strategy, **settings)
            places.put(module, experts)
    for name in plan.saved:
        module = model.get_submodule(name)
        if not isinstance(module, ModuleToSave):
            places.put(module, ModuleToSave(module))
        saved: Any = model.get_submodule(name)
        saved.add(adapter_name)
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and adapted_layers(module):
            disable_fast_path(module)


def _check_sharded(model: nn.Module, plan: Plan) -> None:
    """Raises ``ValueError`` for what cannot be put into a model any more after FSDP2 has sharded it."""
    for name in plan.saved:
        if is_sharded(model.get_submodule(name)):
            raise ValueError(
                f"modules_to_save: a copy of {name!r} would not be sharded. Add the adapter before fully_shard"
            )
    for name in plan.targets:
        for module in (model.get_submodule(path) for path in (name, name.rpartition(".")[0])):
            if isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention):
                require_unsharded(module, repr(name))


def to_merge(
    model: nn.Module, names: Sequence[str], in_place: bool = True, numbers: bool = True
) -> dict[RandLoraLayer, list[str]]:
    """Layer -> which of the adapters `names` are to be merged into it; checked for all layers first.

    `in_place`, `numbers`: as for :meth:`randlora.layers.merging.Mergeable.check_merge`.
    """
    found = {}
    for path, layer in adapted_layers(model).items():
        wanted = [name for name in names if name in layer.randlora_lambda and name not in layer.merged_adapters]
        if wanted:
            found[layer] = wanted
            try:
                layer.check_merge(wanted, in_place, numbers)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path!r} cannot be merged into: {error}") from error
    return found


def unload(
    model: nn.Module, merged: Iterable[str], progressbar: bool = False, safe_merge: bool = False,
    low_memory: bool = False,
) -> nn.Module:  # fmt: skip
    """Merge the adapters `merged` and put the plain modules back; returns the model.

    What raises leaves the model as it was, except with `low_memory`: then layers that were merged before stay so.
    """
    layers, merged = adapted_layers(model), list(merged)
    for attention in (m for m in model.modules() if isinstance(m, MultiheadAttention)):
        attention.check_unwrap()
    wanted = to_merge(model, merged)
    bar = wanted.items()
    if progressbar:
        from tqdm import tqdm

        bar = tqdm(bar, desc="merge and unload" if merged else "unload", unit="layer")
    shared = ties.before_unloading(model, merged)
    if low_memory:
        with all_or_nothing(model):
            ties.part(model, merged)
        _merge(bar, safe_merge, keep=False)
    with all_or_nothing(model), merged_or_not(() if low_memory else wanted):
        if not low_memory:
            ties.part(model, merged)
            _merge(bar, safe_merge, keep=True)
        attentions = {n: m for n, m in model.named_modules() if isinstance(m, MultiheadAttention)}
        places = Places(model)
        for experts in [m for m in model.modules() if isinstance(m, Experts)]:
            places.put(experts, experts.base_layer)
        for name, layer in layers.items():
            if name.rpartition(".")[0] not in attentions and layer.num_experts is None:
                places.put(layer, layer.get_base_layer())
        for attention in attentions.values():
            places.put(attention, attention.unwrap())
        for saved in saved_modules(model).values():
            chosen = next((n for n in merged if n in saved.modules_to_save), None)
            places.put(saved, saved.original_module if chosen is None else saved.modules_to_save[chosen])
        for module in model.modules():
            if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
                restore_fast_path(module)
        ties.forget(model, shared)
    return model


def _merge(wanted: Iterable[tuple[RandLoraLayer, list[str]]], safe_merge: bool, keep: bool) -> None:
    for layer, names in wanted:
        layer.merge(safe_merge, names)
        if not keep:
            layer.forget_unmerged_weight()


class Places:
    """Where each module of a model is used: a module may be in several places (tied modules)."""

    def __init__(self, model: nn.Module) -> None:
        self._found: dict[int, tuple[nn.Module | None, list[tuple[nn.Module, str]]]] = {}
        for parent in model.modules():
            for leaf, module in parent._modules.items():  # named_children() leaves repetitions out
                self._found.setdefault(id(module), (module, []))[1].append((parent, leaf))

    def put(self, old: nn.Module, new: nn.Module) -> None:
        """`new` in all places of `old`."""
        for parent, leaf in self._found[id(old)][1]:
            setattr(parent, leaf, new)
        new.train(old.training)


def check_name(adapter_name: str, taken: Container[str]) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless `adapter_name` can be that of a new adapter."""
    check_adapter_name(adapter_name)
    if adapter_name in taken:
        raise ValueError(f"this model already has an adapter named {adapter_name!r}: delete it first")
