"""Training on several devices: what randlora adds to the engines of ``torch.distributed``."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .agreement import check_ranks

__all__ = ["check_ranks"]


def __getattr__(name: str) -> Any:
    # Imported when it is asked for: it looks at whole models, and their layers ask this folder about their tensors.
    if name in __all__:
        from . import agreement

        return getattr(agreement, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
