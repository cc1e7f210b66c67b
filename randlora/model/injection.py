"""Putting adapters into a model and taking them out again: first a plan that can fail, then changes that cannot."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..bases import hadamard
from ..bases.random_bases import RandomBases
from ..bases.shared import shared, shared_bases
from ..config import RandLoraConfig
from ..layers import offload
from ..layers.attention import MultiheadAttention, check_base, disable_fast_path, restore_fast_path
from ..layers.base_layer import check
from ..layers.linear import Linear
from ..layers.merging import merged_or_not
from ..layers.modules_to_save import ModuleToSave
from ..layers.randlora_layer import RandLoraLayer
from ..names import check_adapter_name, plain_name
from ..undo import all_or_nothing
from . import ties
from .targets import endings_of, find_targets, layer_sizes, peft_dims

# What PEFT trains and saves beside the adapter for these tasks, where the model has it.
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass(frozen=True)
class Plan:
    """What an adapter will be: found and checked, with nothing of the model changed.

    Attributes:
        targets: name -> module to adapt. slots: name -> (in, out) of every linear layer that gets parameters.
        saved: names of modules that are trained in full.
        bases: sized for the slots.
        peft_dims: (max_dim, min_dim) that PEFT's own bases would have for these targets.
    """

    config: RandLoraConfig
    targets: dict[str, nn.Module]
    slots: dict[str, tuple[int, int]]
    saved: list[str]
    bases: RandomBases
    peft_dims: tuple[int, int]

    def num_bases(self, slot: str) -> int:
        return _num_bases(self.config, min(self.slots[slot]))


def plan(model: nn.Module, config: RandLoraConfig, bases: RandomBases | None = None) -> Plan:
    """Find the targets of `config` and the bases for them (or take `bases`, made for another model part or file).

    The plan has a copy of `config`, in which what was left open is filled in.

    Raises:
        ValueError: no or unsupported targets, modules to save that are not there, bases that are too small.
    """
    config = copy.deepcopy(config)
    saved = _find_saved(model, config)
    targets = find_targets(model, config)
    slots = _slots(model, targets)
    offload.check_targets(model, targets, _of_trained_biases(model, config, targets))
    for name in targets:
        _check_target(model, name)
    dims = peft_dims(model, config, targets)
    need = required(config, slots)
    bases = make_bases(config, slots, dims) if bases is None else bases
    bases.require(*need)
    return Plan(config, targets, slots, saved, bases, dims)


def required(config: RandLoraConfig, slots: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    """``(max_dim, min_dim, num_bases)`` of bases that serve these layers: the maxima over each one's own dimensions."""
    smaller = [min(sizes) for sizes in slots.values()]
    return max(map(max, slots.values())), max(smaller), max(_num_bases(config, m) for m in smaller)


def _num_bases(config: RandLoraConfig, min_dim: int) -> int:
    return config.num_bases or -(-min_dim // config.r)


def make_bases(config: RandLoraConfig, slots: dict[str, tuple[int, int]], peft: tuple[int, int]) -> RandomBases:
    """The process's bases for these layers; what `config` leaves open of their definition is filled in."""
    if config.prng != "philox":
        # PEFT's values depend on the size that it draws.
        return shared_peft_bases(*peft, config.r, config.kind, config.projection_prng_key, config.prng)
    if config.kind == "very_sparse" and config.sparsity is None:
        config.sparsity = math.sqrt(max(map(min, slots.values())))
    if config.kind == "hadamard" and config.group_width is None:
        layers = ((min(sizes), _num_bases(config, min(sizes))) for sizes in slots.values())
        config.group_width = hadamard.group_width(layers, config.r)
    return shared_bases(config.r, config.projection_prng_key, config.kind, config.sparsity, config.group_width)


def shared_peft_bases(max_dim: int, min_dim: int, r: int, kind: str, seed: int, prng: str) -> RandomBases:
    return shared(
        ("peft", max_dim, min_dim, r, kind, seed, prng),
        lambda: RandomBases(max_dim, min_dim, r, kind, seed, prng=prng),
    )


def apply(model: nn.Module, plan: Plan, adapter_name: str) -> None:
    """Wrap the targets, or add the adapter to those that are wrapped already. Callers undo what a failure leaves."""
    config = plan.config
    settings = {
        "r": config.r,
        "randlora_alpha": config.randlora_alpha,
        "randlora_dropout": config.randlora_dropout,
        "init_weights": config.init_weights,
        "bases": plan.bases,
        "num_bases": config.num_bases,
    }
    places = Places(model)
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
    for name in plan.saved:
        module = model.get_submodule(name)
        if not isinstance(module, ModuleToSave):
            places.put(module, ModuleToSave(module))
        model.get_submodule(name).add(adapter_name)
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)) and adapted_layers(module):
            disable_fast_path(module)


def to_merge(model: nn.Module, names: Sequence[str]) -> dict[RandLoraLayer, list[str]]:
    """Layer -> which of the adapters `names` are to be merged into it; checked for all layers first."""
    check_whole(*(model.modules() if names else ()))
    found = {}
    for path, layer in adapted_layers(model).items():
        wanted = [name for name in names if name in layer.randlora_lambda and name not in layer.merged_adapters]
        if wanted:
            found[layer] = wanted
            try:
                layer.check_merge(wanted)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{path!r} cannot be merged into: {error}") from error
    return found


def check_whole(*modules: nn.Module) -> None:
    """Raises ``ValueError`` if FSDP2 keeps parts of these modules: what is merged would be lost at the next reshard."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    if name := next((type(module).__name__ for module in modules if isinstance(module, sharded)), None):
        raise ValueError(
            f"the weights of this {name} are put together by fully_shard for every call, so that a merged update would "
            "be lost: save the adapter and merge it into a model that is not sharded"
        )


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
        for name, layer in layers.items():
            if name.rpartition(".")[0] not in attentions:
                places.put(layer, layer.get_base_layer())
        for attention in attentions.values():
            places.put(attention, attention.unwrap())
        for module in saved_modules(model).values():
            chosen = next((n for n in merged if n in module.modules_to_save), None)
            places.put(module, module.original_module if chosen is None else module.modules_to_save[chosen])
        for module in model.modules():
            if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
                restore_fast_path(module)
        ties.forget(model, shared)
    return model


def _merge(wanted: Iterable[tuple[RandLoraLayer, list[str]]], safe_merge: bool, keep: bool) -> None:
    for layer, names in wanted:
        layer.merge(safe_merge, names)
        if not keep:
            layer._unmerged_weight = None


# ---- looking at a model ----


def adapted_layers(model: nn.Module) -> dict[str, RandLoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, RandLoraLayer)}


def saved_modules(model: nn.Module) -> dict[str, ModuleToSave]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ModuleToSave)}


def train_biases(model: nn.Module, modes: set[str]) -> None:
    """Biases of the base model require gradients as these modes (``RandLoraConfig.bias``) ask for."""
    own = {id(p) for layer in adapted_layers(model).values() for p in layer.get_base_layer().parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("bias", "bias_k", "bias_v") and ".modules_to_save." not in name:
            parameter.requires_grad_("all" in modes or ("randlora_only" in modes and id(parameter) in own))


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


# ---- parts of a plan ----


def _check_target(model: nn.Module, name: str) -> None:
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, RandLoraLayer) and module.merged:
        raise ValueError(f"layer {name!r} has merged adapters: call unmerge_adapter() first")
    if not isinstance(module, (RandLoraLayer, nn.MultiheadAttention, MultiheadAttention)):
        try:
            check(module, *layer_sizes(module), not isinstance(module, nn.Linear))
        except (TypeError, ValueError) as error:
            raise type(error)(f"target_modules matches {name!r}, which cannot be adapted: {error}") from error
    attention = next((m for m in (module, parent) if isinstance(m, nn.MultiheadAttention)), None)
    if attention is not None and not isinstance(attention, MultiheadAttention):
        try:
            check_base(attention)
        except (TypeError, ValueError) as error:
            raise ValueError(f"target_modules matches {name!r}, which cannot be adapted: {error}") from error


def _of_trained_biases(model: nn.Module, config: RandLoraConfig, targets: dict[str, nn.Module]) -> Iterator[nn.Module]:
    if config.bias == "none" or config.inference_mode:
        return
    for module in model.modules() if config.bias == "all" else targets.values():
        base = module.get_base_layer() if isinstance(module, RandLoraLayer) else module
        if getattr(base, "bias", None) is not None:
            yield base


def _slots(model: nn.Module, targets: dict[str, nn.Module]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    for name, module in targets.items():
        if isinstance(module, (nn.MultiheadAttention, MultiheadAttention)):
            E = module.embed_dim
            for part, size in zip(PROJECTIONS, (E, module.kdim, module.vdim, E), strict=True):
                found[f"{name}.{part}"] = size, E
        else:
            found[name] = layer_sizes(module)
    for name in targets:
        parent = name.rpartition(".")[0]
        if parent and parent in targets:
            raise ValueError(f"target_modules matches {name!r} and {parent!r}, which contains it: choose one of them")
    return found


def _find_saved(model: nn.Module, config: RandLoraConfig) -> list[str]:
    wanted = list(config.modules_to_save or ())
    names = [name for name, module in model.named_modules() if name and "modules_to_save" not in name.split(".")]
    meant: dict[str, list[str]] = {}  # ending -> names
    for name in names:
        if "original_module" not in name.split(".") and not name.endswith("_orig_mod"):
            for ending in endings_of(plain_name(name)):
                meant.setdefault(ending, []).append(name)
    wanted += [head for head in TASK_HEADS.get(config.task_type or "", ()) if head in meant and head not in wanted]
    found: list[str] = []
    for target in wanted:
        if target not in meant:
            raise ValueError(f"modules_to_save: {target!r} matches no module of this model")
        for name in meant[target]:
            if not any(f"{name}.".startswith(f"{other}.") for other in found):
                found.append(name)
    for name in found:
        if adapted_layers(model.get_submodule(name)):
            raise ValueError(f"modules_to_save: {name!r} contains layers that another adapter adapts")
    if wanted:
        config.modules_to_save = wanted
    return found
