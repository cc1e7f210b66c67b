"""What an adapter will be: all of it is found in the model and checked before anything of the model is changed."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ..bases import hadamard
from ..bases.definition import bases_for_full_rank
from ..bases.random_bases import RandomBases
from ..bases.shared import shared, shared_bases
from ..config import RandLoraConfig
from ..layers import initial, offload
from ..layers.attention import PROJECTIONS, MultiheadAttention
from ..layers.attention_parts import check_base
from ..layers.base_layer import check
from ..layers.experts import Experts
from ..layers.experts_form import sizes as experts_sizes
from ..layers.linears import is_transposed
from ..layers.randlora_layer import RandLoraLayer
from ..names import plain_name
from .parts import adapted_layers
from .targets import endings_of, find_target_parameters, find_targets, layer_sizes, named_targets, peft_dims

# What PEFT trains and saves beside the adapter for these tasks, where the model has it.
TASK_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclass(frozen=True)
class Plan:
    """An adapter that a model can be given.

    Attributes:
        config: the plan's own; what the caller's leaves to the model is filled in.
        targets: name -> module to adapt. slots: name -> (in, out) of every linear layer that gets parameters.
        experts: name of a module of fused experts -> which of its parameters are adapted; each of these is a slot.
        saved: names of modules that are trained in full.
        bases: sized for the slots.
        peft_dims: (max_dim, min_dim) that PEFT's own bases would have for these targets.
        by_rule: whether the config's alpha was ``"auto"``, so that gamma starts by the rule.
    """

    config: RandLoraConfig
    targets: dict[str, nn.Module]
    slots: dict[str, tuple[int, int]]
    saved: list[str]
    bases: RandomBases
    peft_dims: tuple[int, int]
    experts: dict[str, tuple[str, ...]]
    num_experts: dict[str, int]  # of the slots that have any
    by_rule: bool = False

    @property
    def alpha(self) -> initial.Alpha:
        """The config's, as layers take it."""
        alpha = self.config.randlora_alpha
        return initial.ByRule(cast(float, alpha)) if self.by_rule else alpha

    def num_bases(self, slot: str) -> int:
        return _num_bases(self.config, min(self.slots[slot]))

    def shapes(self, slot: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of lambda and of gamma."""
        n = self.num_bases(slot)
        of_experts = (self.num_experts[slot],) if slot in self.num_experts else ()
        return (*of_experts, self.config.r, n), (*of_experts, n, min(self.slots[slot]))

    def required(self) -> tuple[int, int, int]:
        """``(max_dim, min_dim, num_bases)`` of bases that serve these layers."""
        return required(self.config, self.slots)

    def on(self, bases: RandomBases) -> Plan:
        """The same adapter on other bases. Raises ``ValueError`` if they are too small."""
        bases.require(*self.required())
        return dataclasses.replace(self, bases=bases)

    def on_own_bases(self) -> Plan:
        """The same adapter on the bases that its config defines: see :func:`own_bases`."""
        config, bases = own_bases(self.config, self.slots, self.peft_dims)
        return dataclasses.replace(self, config=config).on(bases)

    def with_inference_mode(self, inference_mode: bool) -> Plan:
        """The same adapter, frozen or not when it first acts."""
        return dataclasses.replace(self, config=filled(self.config, inference_mode=inference_mode))


def plan_adapter(model: nn.Module, config: RandLoraConfig, bases: RandomBases | None = None) -> Plan:
    """Find what `config` means in `model`, and the bases for it (or take `bases`, made for another model part or file).

    Neither `model` nor `config` is changed.

    Raises:
        ValueError: no or unsupported targets, modules to save that are not there, bases that are too small.
    """
    to_save, saved = _find_saved(model, config)
    config = filled(config, modules_to_save=to_save, target_modules=named_targets(model, config))
    targets = find_targets(model, config)
    slots = _slots(model, targets)
    experts, num_experts = find_target_parameters(model, config), dict[str, int]()
    for path, names in experts.items():
        module: Any = model.get_submodule(path)
        module = module.base_layer if isinstance(module, Experts) else module
        slots |= {f"{path}.{name}": experts_sizes(module, name) for name in names}
        num_experts |= {f"{path}.{name}": module.num_experts for name in names}
    offload.check_targets(model, [*targets, *experts], _of_trained_biases(model, config, targets))
    for name in targets:
        _check_target(model, name)
    dims = peft_dims([*map(layer_sizes, targets.values()), *(slots[slot] for slot in num_experts)])
    if bases is None:
        config, bases = own_bases(config, slots, dims)
    plan = Plan(config, targets, slots, saved, bases, dims, experts, num_experts).on(bases)
    if config.randlora_alpha != initial.AUTO:
        return plan
    alpha = initial.alpha_of(config.r, (initial.Shape(*slots[slot], plan.num_bases(slot)) for slot in slots))
    return dataclasses.replace(plan, config=filled(config, randlora_alpha=alpha), by_rule=True)


def filled(config: RandLoraConfig, **found: Any) -> RandLoraConfig:
    """A copy of `config` with these fields."""
    config = copy.deepcopy(config)
    for name, value in found.items():
        setattr(config, name, value)
    return config


# ---- bases ----


def required(config: RandLoraConfig, slots: dict[str, tuple[int, int]]) -> tuple[int, int, int]:
    """``(max_dim, min_dim, num_bases)`` of bases that serve these layers: the maxima over each one's own dimensions."""
    smaller = [min(sizes) for sizes in slots.values()]
    return max(map(max, slots.values())), max(smaller), max(_num_bases(config, m) for m in smaller)


def _num_bases(config: RandLoraConfig, min_dim: int) -> int:
    return config.num_bases or bases_for_full_rank(min_dim, config.r)


def own_bases(
    config: RandLoraConfig, slots: dict[str, tuple[int, int]], drawn: tuple[int, int]
) -> tuple[RandLoraConfig, RandomBases]:
    """`config` with what it leaves open of its bases' definition filled in, and the process's bases of that definition.

    PEFT's values depend on the size that it draws: with its random numbers, `drawn` is ``(max_dim, min_dim)`` of that.
    """
    kind = cast(str, config.kind)  # the config has taken it from its flags
    if config.prng != "philox":
        sizes = (*drawn, config.r, kind, config.projection_prng_key)
        return config, shared(("peft", *sizes, config.prng), lambda: RandomBases(*sizes, prng=config.prng))
    smaller = [min(sizes) for sizes in slots.values()]
    if config.kind == "very_sparse" and config.sparsity is None:
        config = filled(config, sparsity=math.sqrt(max(smaller)))
    if config.kind == "hadamard" and config.group_width is None:
        layers = ((m, _num_bases(config, m)) for m in smaller)
        config = filled(config, group_width=hadamard.group_width(layers, config.r))
    bases = shared_bases(config.r, config.projection_prng_key, kind, config.sparsity, config.group_width)
    return config, bases


# ---- layers ----


def _check_target(model: nn.Module, name: str) -> None:
    module, parent = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, RandLoraLayer) and module.merged:
        raise ValueError(f"layer {name!r} has merged adapters: call unmerge_adapter() first")
    if not isinstance(module, (RandLoraLayer, nn.MultiheadAttention, MultiheadAttention)):
        try:
            check(module, *layer_sizes(module), is_transposed(module))
        except (TypeError, ValueError) as error:
            raise type(error)(f"target_modules matches {name!r}, which cannot be adapted: {error}") from error
    attention = next((m for m in (module, parent) if isinstance(m, nn.MultiheadAttention)), None)
    if attention is not None and not isinstance(attention, MultiheadAttention):
        try:
            check_base(attention)
        except (TypeError, ValueError) as error:
            raise ValueError(f"target_modules matches {name!r}, which cannot be adapted: {error}") from error


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


# ---- what is trained beside them ----


def _of_trained_biases(model: nn.Module, config: RandLoraConfig, targets: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """The modules whose biases this adapter trains."""
    if config.bias == "none" or config.inference_mode:
        return
    for module in model.modules() if config.bias == "all" else targets.values():
        base = module.get_base_layer() if isinstance(module, RandLoraLayer) else module
        if getattr(base, "bias", None) is not None:
            yield base


def _find_saved(model: nn.Module, config: RandLoraConfig) -> tuple[list[str] | None, list[str]]:
    """``modules_to_save`` with the heads of the config's task, and the names of the modules that this means."""
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
    return wanted or config.modules_to_save, found
