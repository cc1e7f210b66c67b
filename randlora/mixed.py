"""A batch of mixed adapters: every sample goes through its own adapter, the base product is computed once for all.

``with mixed_batch(model, layers, names):`` holds the names, one per sample, for the calls of `model` inside it; each
layer then adds, per adapter, the update of that adapter's rows (:func:`add_updates`). PEFT has this for LoRA
(``adapter_names=``, S-LoRA and Punica have kernels for it) and ignores it for RandLoRA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

BASE = "__base__"  # PEFT's name for: no adapter


class MixedBatch:
    """The adapter names of a batch and the sizes of the call in progress, by which layers tell samples apart."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.size, self.tokens = len(self.names), 0

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model: beam search and several sequences per prompt repeat samples in place."""
        first = next((t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 0), None)
        if first is None:
            return
        if first.shape[0] == 0 or first.shape[0] % len(self.names):
            raise ValueError(
                f"adapter_names must have one name per sample, got {len(self.names)} names for an input of shape "
                f"{list(first.shape)}"
            )
        self.size, self.tokens = first.shape[0], first.shape[1] if first.dim() > 1 else 0

    def rows(self, x: Tensor) -> dict[str, Tensor]:
        """Adapter name -> indices along x's first dimension. Raises ``ValueError`` if samples cannot be told apart."""
        count = len(self.names)
        sizes = {count, self.size}
        if x.dim() == 2:  # some models flatten [batch, tokens, features] before their layers
            sizes |= {size * self.tokens for size in sizes}
        if x.dim() < 2 or x.shape[0] not in sizes:
            raise ValueError(
                f"adapter_names: a layer got an input of shape {list(x.shape)}, whose rows cannot be assigned to the "
                f"{count} samples: this model does not keep the batch as the first dimension"
            )
        repeat = x.shape[0] // count
        found: dict[str, list[int]] = {}
        for i, name in enumerate(self.names):
            found.setdefault(name, []).extend(range(i * repeat, (i + 1) * repeat))
        return {name: torch.tensor(rows, device=x.device) for name, rows in found.items()}


def add_updates(
    batch: MixedBatch, x: Tensor, result: Tensor, adapters: Iterable[str], update: Callable[[Tensor, str], Tensor]
) -> Tensor:
    """`result`, the base layer's, plus ``update(rows of x, name)`` for the rows of each name that is in `adapters`."""
    for name, rows in batch.rows(x).items():
        if name in adapters:
            result = result.index_add(0, rows, update(x.index_select(0, rows), name).to(result.dtype))
    return result


@contextlib.contextmanager
def mixed_batch(model: nn.Module, layers: Sequence[nn.Module], names: Sequence[str] | None) -> Iterator[None]:
    """While this lasts, calls of `model` take `names`, one per sample, instead of the active adapters (None: as ever).

    Args:
        layers: the adapted layers in `model`: those with an attribute ``mixed_batch``, ``randlora_lambda`` and
            ``merged_adapters``.

    Raises:
        TypeError, ValueError: names that no layer knows, merged layers, or gradient checkpointing while training, which
            would run the layers once more after the batch is over.
    """
    if names is None:
        yield
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list of names, one per sample, got {names!r}")
    known = {name for layer in layers for name in layer.randlora_lambda}
    if not names or (unknown := sorted(set(names) - known - {BASE})):
        got = ", ".join(unknown) if names else "an empty list"
        raise ValueError(f"adapter_names must be {BASE!r} or one of {', '.join(sorted(known))}, got {got}")
    if any(layer.merged_adapters for layer in layers):
        raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first")
    if model.training and torch.is_grad_enabled() and getattr(model, "is_gradient_checkpointing", False):
        raise ValueError("adapter_names cannot be used with gradient checkpointing in training")
    batch = MixedBatch(names)
    hook = model.register_forward_pre_hook(batch.see, with_kwargs=True)
    try:
        for layer in layers:
            layer.mixed_batch = batch
        yield
    finally:
        hook.remove()
        for layer in layers:
            layer.mixed_batch = None
