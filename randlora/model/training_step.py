"""Where a model is called to be trained, several processes may be at it together: these are looked at once."""

from __future__ import annotations

import torch
from torch import distributed, nn

from ..private_torch import active_ddp


def at_training_step(owner: nn.Module) -> None:
    """To be called at every call of `owner`, a model with adapters: see :mod:`randlora.distributed.first_step`."""
    if not owner.training or torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    ddp = active_ddp()
    if ddp is not None or (distributed.is_available() and distributed.is_initialized()):
        from ..distributed import first_step

        first_step.look(owner, ddp)
