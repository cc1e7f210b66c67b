"""The merged model as servers that generate take it: for reinforcement learning, at every step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..model.model import RandLoraModel
from .merged import parts_of
from .original_names import Original


def weights_to_send(model: RandLoraModel) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the merged model, for ``load_weights`` of vLLM or SGLang; `model` does not change.

    As ``model.merged_tensors(original_names=True, dequantize=True)``, but what several modules share, such as tied
    embeddings, comes once: servers know it under its first name.
    """
    found = parts_of(model.model, model.active_adapters, dequantize=True)
    first = {id(part.like): name for name, part in reversed(found.items())}
    parts = {name: part for name, part in found.items() if first[id(part.like)] == name}
    files = Original(model.model, {name: part.like for name, part in parts.items()})
    return files.tensors((name, part.make()) for name, part in parts.items())
