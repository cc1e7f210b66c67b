"""Names: of adapters, which become attributes, keys and folders, and of modules, which wrappers put parts into."""

from __future__ import annotations

import unicodedata

from torch import nn

from .layers.mixed_batch import BASE

LONGEST = 200  # bytes of UTF-8: file systems take 255
_CONTAINERS = nn.ParameterDict(), nn.ModuleDict()  # what layers keep their adapters in, as attributes
# What torch.compile, activation checkpointing and FSDP call the module inside them.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def check_adapter_name(name: str) -> None:
    """Raises ``TypeError`` or ``ValueError`` unless `name` can be that of an adapter in memory and in files."""
    if not isinstance(name, str):
        raise TypeError(f"adapter_name must be a string, got {name!r}")
    if not name or name == BASE or any(part in name for part in "./\\"):
        raise ValueError(f"adapter_name must not be empty, {BASE!r}, or contain '.', '/' or '\\', got {name[:300]!r}")
    check_savable(name)
    if any(hasattr(container, name) for container in _CONTAINERS):
        raise ValueError(f"adapter_name {name!r} is taken by torch.nn's containers: choose another one")


def check_savable(name: str) -> None:
    """Raises ``ValueError`` for a name that no folder can have, or that no terminal shows as it is."""
    # Cc: control characters, NUL among them. Cs: lone surrogates, which have no UTF-8.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise ValueError(f"adapter_name must not contain control characters or surrogates, got {name[:300]!r}")
    if (size := len(name.encode())) > LONGEST:
        raise ValueError(
            f"adapter_name must have at most {LONGEST} bytes of UTF-8, as it names a folder, got {size}: "
            f"{name[:50]!r}..."
        )


def is_wrapper(module: nn.Module) -> bool:
    """Whether names of modules leave this one out: what it contains stands for it."""
    return any(name in module._modules for name in WRAPPED)


def plain_name(name: str) -> str:
    """The name of a module or tensor as in a model that is not compiled, checkpointed or sharded."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)
