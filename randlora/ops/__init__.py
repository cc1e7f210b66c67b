"""What PyTorch has to know of the operators: their derivatives, their shapes, and the rules of ``torch.func``."""

# PyTorch is told when they are imported.
from . import fake_kernels, linear, sparse_update, unique_base  # noqa: F401
