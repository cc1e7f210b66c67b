"""Which parameters of a model a config means by ``target_parameters``: PEFT's rule, by endings of names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..layers.experts import Experts
from ..layers.experts_form import FORM, check_base, is_fused_experts, weight_names
from ..names import is_wrapper, plain_name


def find_parameters(model: nn.Module, wanted: list[str], allowed: Callable[[str], bool]) -> dict[str, tuple[str, ...]]:
    """Name of a module -> which of its parameters `wanted` means, in the model's order.

    Adapted experts stand for themselves. A module that a model uses under several names is found under the first.

    Args:
        wanted: names, or their last components. allowed: whether a parameter of this plain name may be meant at all.

    Raises:
        ValueError: a name that means nothing, or a parameter that cannot be adapted, with the reason.
    """
    found: dict[str, list[str]] = {}
    used: set[str] = set()
    known: dict[str, str] = {}  # ending -> name, of what could be meant
    seen: set[int] = set()
    for path, module in _modules(model):
        first = id(module) not in seen
        seen.add(id(module))
        for name, parameter in _parameters(module):
            full = plain_name(f"{path}.{name}" if path else name)
            if _is_weight(module, name) or parameter.dim() == 3:
                known.setdefault(".".join(full.rsplit(".", 2)[-2:]), full)
            meant = [target for target in wanted if full == target or full.endswith(f".{target}")]
            used.update(meant)
            if meant and first and allowed(full):
                _check(module, path, name, full)
                found.setdefault(path, []).append(name)
    if missing := next((target for target in wanted if target not in used), None):
        raise ValueError(
            f"target_parameters: {missing!r} matches no parameter of this model{_hint(model, missing, known)}"
        )
    if not found:
        raise ValueError(
            f"target_parameters={wanted!r} matches only what layers_to_transform, exclude_modules or modules_to_save "
            "leave out"
        )
    return {path: tuple(names) for path, names in found.items()}


def weights_of_experts(model: nn.Module) -> list[str]:
    """Endings of the names of all parameters that can be adapted, such as ``"experts.down_proj"``."""
    first = {id(module): (path, module) for path, module in reversed(list(_modules(model)))}
    found = (
        ".".join([*plain_name(path).split(".")[-1:], name])
        for path, module in reversed(first.values())
        for name, _ in _parameters(module)
        if path and _is_weight(module, name)
    )
    return list(dict.fromkeys(found))


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """All modules under all their names, but for what is inside adapted experts, or wraps another."""
    inner: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if name.startswith(tuple(inner)) or is_wrapper(module):
            continue
        if isinstance(module, Experts) or getattr(module, "is_modules_to_save", False):
            inner.append(f"{name}.")
        yield name, module


def _parameters(module: Any) -> Iterator[tuple[str, Tensor]]:
    owner = module.base_layer if isinstance(module, Experts) else module
    yield from owner.named_parameters(recurse=False)


def _is_weight(module: Any, name: str) -> bool:
    experts = module.base_layer if isinstance(module, Experts) else module
    return is_fused_experts(experts) and name in weight_names(experts)


def _check(module: Any, path: str, name: str, full: str) -> None:
    """Raises ``ValueError`` for a parameter that cannot be adapted."""
    if not path:
        raise ValueError(
            f"target_parameters: {full!r} is a parameter of the model itself, which has no place for adapted experts: "
            "take randlora.Experts(model, ...), or adapt a module around it"
        )
    if isinstance(module, Experts):
        if any(layer.merged for layer in module.adapted()):
            raise ValueError(f"the experts {path!r} have merged adapters: call unmerge_adapter() first")
        module = module.base_layer
    elif not is_fused_experts(module) and not (name == "weight" and isinstance(module, nn.Linear)):
        shape = "x".join(map(str, dict(_parameters(module))[name].shape))
        raise ValueError(
            f"target_parameters matches {full!r}, a parameter {shape} of a {type(module).__name__}, which cannot be "
            f"adapted: {FORM}"
        )
    elif isinstance(module, nn.Linear):
        raise ValueError(
            f"target_parameters matches {full!r}, the weight of a {type(module).__name__}: target_modules adapts it"
        )
    try:
        check_base(module, (name,))
    except (TypeError, ValueError) as error:
        raise type(error)(f"target_parameters matches {full!r}, which cannot be adapted: {error}") from error


def _hint(model: nn.Module, missing: str, known: dict[str, str]) -> str:
    leaf = missing.rsplit(".", 1)[-1][:200]
    if known:
        close = difflib.get_close_matches(missing[-200:], known, 2, 0.5)
        close += [ending for ending in known if ending.endswith(f".{leaf}") and ending not in close]
        meant = f"; did you mean {' or '.join(map(repr, close[:3]))}?" if close else ""
        return f"{meant} (parameters of experts: {', '.join(list(known)[:10])})"
    apart = {
        match[1]: None
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (match := re.search(r"\bexperts\.\d+\.(?:.*\.)?(\w+)$", name))
    }
    if apart:
        return (
            f": its experts are modules of their own, with linear layers that target_modules adapts: "
            f"{', '.join(map(repr, apart))}"
        )
    return ", which has no fused experts"
