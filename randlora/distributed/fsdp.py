"""What FSDP2 (``torch.distributed.fsdp.fully_shard``) needs of modules whose parameters it shards.

Between calls these are ``DTensor``, of which each rank holds a part; for a call they are put together into others,
ordinary ones. Those of the root stay so afterwards. What is done to them then is lost, so that everything that looks
at parameters or changes them asks for the parts first.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..private_torch import is_put_together
from .gathering import is_dtensor


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 shards parameters of this module or of those inside it."""
    return any(map(is_put_together, module.modules()))


def is_hook(hook: Any) -> bool:
    """Whether a module's `hook` is one of those by which FSDP2 puts parameters together."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


def hold_parts(modules: Iterable[nn.Module]) -> None:
    """Let these modules (not those inside them) hold their parts again, where a call has left them put together."""
    for module in modules:
        parameters = module._parameters.values()
        if is_put_together(module) and not all(p is None or is_dtensor(p) for p in parameters):
            module.state_dict(keep_vars=True)  # FSDP2 has a hook there, the only way to its groups from inside one
