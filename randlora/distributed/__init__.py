"""Training on several devices: what randlora adds to the engines of ``torch.distributed``."""

from .agreement import check_ranks

__all__ = ["check_ranks"]
