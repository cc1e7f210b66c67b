"""Which layers of a model a config means: PEFT's rules for ``target_modules`` and its companions."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..config import ALL_LINEAR, RandLoraConfig
from ..expressions import Expression
from ..layers.attention import PROJECTIONS, MultiheadAttention
from ..layers.experts import Experts
from ..layers.experts_form import is_fused_experts, weight_names
from ..layers.linears import is_linear, is_sure_to_be_linear, sizes_of
from ..layers.randlora_layer import RandLoraLayer
from ..names import is_wrapper, plain_name
from .target_parameters import find_parameters, weights_of_experts


def named_targets(model: nn.Module, config: RandLoraConfig) -> list[str] | str:
    """``target_modules`` of `config`, or the defaults of the model's architecture, which are taken from PEFT.

    Empty with ``target_parameters`` alone, and, as in PEFT, with these where the architecture has no defaults.

    Raises:
        ValueError: a model that has no layer of its own to adapt, no names, or no defaults.
    """
    if is_supported(model):
        raise ValueError(
            f"this model is itself one layer, a {type(model).__name__}, with nothing to put an adapted layer into: "
            "take randlora.Linear(model, ...), or adapt torch.nn.Sequential(model)"
        )
    others = config.target_parameters is not None
    if config.target_modules is not None:
        if not config.target_modules and not others:
            raise ValueError("target_modules must name at least one layer, got an empty list")
        return config.target_modules
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind is None and others:
        return []
    if kind is None:
        raise ValueError('target_modules must be given for this model: names of layers, or "all-linear"')
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING as table
    except ImportError as error:
        raise ValueError(
            "target_modules must be given: the defaults of known architectures are taken from PEFT, which is not "
            "installed (pip install peft)" + ("; [] adapts target_parameters alone" if others else "")
        ) from error
    if kind not in table and others:
        return []
    if kind not in table:
        raise ValueError(f'target_modules must be given: there is no default for {kind!r}; "all-linear" is one choice')
    return table[kind] if isinstance(table[kind], str) else sorted(table[kind])


def find_targets(model: nn.Module, config: RandLoraConfig) -> dict[str, nn.Module]:
    """Name -> module for every layer that `config`, which has ``target_modules``, means; in the model's order.

    Adapted layers stand for themselves. ``nn.MultiheadAttention`` counts as one layer; its ``out_proj`` alone can be
    targeted too. A module that a model uses under several names is meant by each of them, and found under the first.
    Names are matched as they are in a model that is not compiled (:func:`randlora.names.plain_name`).

    Raises:
        ValueError: nothing matches (with the nearest names), something that is not supported does, or a regular
            expression takes too long.
    """
    wanted = config.target_modules
    assert wanted is not None
    if not wanted:  # there are target_parameters
        return {}
    modules = dict(_named_modules(model))
    names: dict[int, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(id(module), []).append(name)
    is_excluded = _matcher("exclude_modules", config.exclude_modules)
    excluded = {id(module) for name, module in modules.items() if is_excluded(plain_name(name))}
    if config.exclude_modules and not excluded and not config.target_parameters:
        warnings.warn(f"exclude_modules={config.exclude_modules!r} matches nothing in this model", stacklevel=2)
    saved, has_index = set(config.modules_to_save or ()), _index_matcher(config)
    allowed = {
        key: [n for n in known if n and not _inside(plain_name(n), saved) and has_index(plain_name(n))]
        for key, known in names.items()
        if key not in excluded
    }
    if _is_all_linear(wanted):
        head = getattr(model, "get_output_embeddings", lambda: None)()
        # The parts of an attention are adapted with it.
        inner = tuple(f"{name}." for name, module in modules.items() if is_attention(module))
        found = {n[0]: modules[n[0]] for n in (names[key] for key, left in allowed.items() if left)}
        linear = {name: m for name, m in found.items() if _is_meant_by_all(m) and not name.startswith(inner)}
        for name, module in linear.items():
            _check_has_size(name, module)
        linear = {name: m for name, m in linear.items() if m is not head and all(layer_sizes(m))}
        _check_not_compiled(linear, wanted)
        return _some(linear, model, config, wanted)
    is_wanted = _matcher("target_modules", wanted)
    meant = [names[key][0] for key, left in allowed.items() if any(is_wanted(plain_name(name)) for name in left)]
    hits = {name: modules[name] for name in meant}
    _check_not_compiled(hits, wanted)
    _check_supported(hits, wanted)
    if isinstance(wanted, list):
        endings = {ending for name in modules for ending in endings_of(plain_name(name))}
        for target in wanted:
            if target not in endings:
                raise ValueError(f"target_modules: {target!r} matches no layer of this model{_meant([target], model)}")
    return _some(hits, model, config, wanted)


def find_target_parameters(model: nn.Module, config: RandLoraConfig) -> dict[str, tuple[str, ...]]:
    """Name of a module -> its parameters, for all that ``target_parameters`` of `config` means, in the model's order.

    ``layers_to_transform``, ``exclude_modules`` (of the module or of the parameter) and ``modules_to_save`` leave out
    as they do for ``target_modules``. Raises ``ValueError`` as :func:`find_parameters`.
    """
    if config.target_parameters is None:
        return {}
    is_excluded = _matcher("exclude_modules", config.exclude_modules)
    saved, has_index = set(config.modules_to_save or ()), _index_matcher(config)

    def allowed(name: str) -> bool:
        module = name.rpartition(".")[0]
        return not (is_excluded(name) or is_excluded(module) or _inside(name, saved)) and has_index(name)

    return find_parameters(model, config.target_parameters, allowed)


def _is_all_linear(wanted: list[str] | str) -> bool:
    return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


def _check_not_compiled(found: dict[str, nn.Module], wanted: list[str] | str) -> None:
    for name in found:
        if name.endswith("_orig_mod"):
            raise ValueError(
                f"target_modules={wanted!r} matches {plain_name(name)!r}, which torch.compile has compiled by itself "
                "and would go on calling as it was: adapt it before, or compile a module around it"
            )


def _check_supported(found: dict[str, nn.Module], wanted: list[str] | str) -> None:
    for name, module in found.items():
        _check_has_size(name, module)
        if getattr(module, "is_modules_to_save", False):
            raise ValueError(
                f"target_modules={wanted!r} matches {name!r}, which another adapter has among its modules_to_save"
            )
        if is_supported(module) and not all(layer_sizes(module)):
            raise ValueError(
                f"target_modules={wanted!r} matches {name!r}, a {type(module).__name__} with (in, out) = "
                f"{layer_sizes(module)}: without numbers there is nothing to adapt; exclude_modules leaves it out"
            )
        if not is_supported(module):
            inside = [f"{name}.{n}" for n, m in module.named_modules() if n and is_supported(m)][:3]
            fused = is_fused_experts(module) or isinstance(module, Experts)
            raise ValueError(
                f"target_modules={wanted!r} matches {name!r}, a {type(module).__name__}, which cannot be adapted: "
                "torch.nn.Linear, transformers' Conv1D, torch.nn.MultiheadAttention and other layers with in_features "
                "and out_features can"
                + (f"; inside it: {', '.join(inside)}" if inside else "; exclude_modules leaves it out")
                + (f"; target_parameters adapts its {' and '.join(weight_names(module))}" if fused else "")
            )


def _check_has_size(name: str, module: nn.Module) -> None:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(f"{name!r} is a lazy layer that has no size yet: call the model once before adapting it")


def is_attention(module: nn.Module) -> bool:
    return isinstance(module, (nn.MultiheadAttention, MultiheadAttention))


def is_supported(module: nn.Module) -> bool:
    return isinstance(module, RandLoraLayer) or is_attention(module) or is_linear(module)


def _is_meant_by_all(module: nn.Module) -> bool:
    return isinstance(module, RandLoraLayer) or is_attention(module) or is_sure_to_be_linear(module)


def _named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under all the names that they have in the unadapted model."""
    inner: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(inner)):
            continue
        if is_wrapper(module):
            continue
        if isinstance(module, (RandLoraLayer, Experts)) or getattr(module, "is_modules_to_save", False):
            inner.append(f"{name}.")
        elif isinstance(module, MultiheadAttention):
            inner += [f"{name}.{part}." for part in PROJECTIONS]
            inner += [f"{name}.{part}" for part in PROJECTIONS[:3]]
        yield name, module


def _matcher(setting: str, wanted: list[str] | str | None) -> Callable[[str], bool]:
    """Whether `wanted` means a name: a regular expression for it as a whole, or one of its endings."""
    if isinstance(wanted, str):
        expression = Expression(setting, wanted)
        return lambda name: expression.fullmatch(name) is not None
    named = set(wanted or ())
    return lambda name: not named.isdisjoint(endings_of(name))


def endings_of(name: str) -> Iterator[str]:
    """``"a.b.c"``: itself, ``"b.c"`` and ``"c"``, which all mean it in a list of names."""
    while name:
        yield name
        name = name.partition(".")[2]


def _inside(name: str, parents: set[str]) -> bool:
    """Whether one of `parents` is `name` or a run of its parts."""
    parts = name.split(".")
    ends = range(1, len(parts) + 1)
    return bool(parents) and any(".".join(parts[i:j]) in parents for j in ends for i in range(j))


def _index_matcher(config: RandLoraConfig) -> Callable[[str], bool]:
    """Whether the first number in a name (after `layers_pattern`, if given) is among ``layers_to_transform``."""
    if config.layers_to_transform is None:
        return lambda name: True
    indices: Any = config.layers_to_transform  # the config has made a list of a single number
    wanted = set(indices)
    given: Any = config.layers_pattern or [None]
    patterns: Sequence[str | None] = [given] if isinstance(given, str) else given
    start, end = r"(?:^|.*?\.)", r"(?P<randlora_index>\d+)(?:\.|$)"
    expressions = [
        Expression("layers_pattern", "" if p is None else p, start + ("" if p is None else rf"(?:{p})\.") + end)
        for p in patterns
    ]

    def has_index(name: str) -> bool:
        found = next(filter(None, (expression.match(name) for expression in expressions)), None)
        return found is not None and int(found["randlora_index"]) in wanted

    return has_index


def _some(
    found: dict[str, nn.Module], model: nn.Module, config: RandLoraConfig, wanted: list[str] | str
) -> dict[str, nn.Module]:
    if found:
        return found
    rules = ", ".join(
        f"{name}={value!r}"
        for name in ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save")
        if (value := getattr(config, name)) is not None
    )
    raise ValueError(f"{rules} matches no layer of this model{_meant(wanted, model)}")


def _meant(wanted: list[str] | str, model: nn.Module) -> str:
    names = [plain_name(name) for name, module in _named_modules(model) if is_supported(module) and name]
    short = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))
    fused = weights_of_experts(model)
    beside = f"; target_parameters adapts the weights of its experts: {', '.join(fused[:10])}" if fused else ""
    if not short:
        return f", which has no layer that could be adapted{beside}"
    listing = ", ".join(short[:20]) + (", ..." if len(short) > 20 else "")
    if isinstance(wanted, str) and wanted in short:
        return f": a string is a regular expression for whole names; did you mean the list [{wanted!r}]?"
    leaf = "" if isinstance(wanted, str) else wanted[0].rsplit(".", 1)[-1][:200]  # comparing is quadratic
    close = [name for name in short if leaf and leaf in name] or difflib.get_close_matches(leaf, short, 3, 0.5)
    if leaf in short or any(name.endswith(f".{leaf}") for name in fused):
        close = []  # the name is right, another rule leaves it out, or it is no layer's
    meant = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{meant} (its linear layers: {listing}{beside})"


def peft_dims(sizes: Collection[tuple[int, int]]) -> tuple[int, int]:
    """``(max_dim, min_dim)`` of the bases that PEFT would make: it takes the largest out and in dimensions apart.

    `sizes`: (in, out) of what it finds.
    """
    largest_in, largest_out = max(s[0] for s in sizes), max(s[1] for s in sizes)
    return max(largest_in, largest_out), min(largest_in, largest_out)


def layer_sizes(module: Any) -> tuple[int, int]:
    """in_features and out_features of a layer that :func:`is_supported`."""
    if is_attention(module):
        sizes = module.embed_dim, module.kdim, module.vdim
        return max(sizes) if all(sizes) else 0, module.embed_dim
    found = sizes_of(module)
    assert found is not None
    return found
