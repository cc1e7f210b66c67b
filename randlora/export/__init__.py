"""Where an adapter goes after training: into LoRA's format, and into the weights of the model."""

from .lora import to_lora
from .merged import to_merged
from .table import LoraExport

__all__ = ["LoraExport", "to_lora", "to_merged"]
