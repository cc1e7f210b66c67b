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
CHECKPOINTING = "adapter_names cannot be used with gradient checkpointing in training"


# A call's samples are counted in the first of these that it has, else in its first tensor.
INPUTS = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_values",
    "input_features",
)  # fmt: skip


class MixedBatch:
    """The adapter names of a batch and the sizes of the call in progress, by which layers tell samples apart.

    Args:
        exact: the batch has as many samples as names. Else it may be a multiple, as in beam search, with each sample's
            repetitions in a row.
        length_first: parts of the model have the batch as their second dimension.
    """

    def __init__(self, names: Sequence[str], exact: bool = False, length_first: bool = False) -> None:
        self.names, self.exact, self.length_first = tuple(names), exact, length_first
        self.size, self.tokens = len(self.names), 0
        self.with_gradients = torch.is_grad_enabled()
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model: notes the number of samples and tokens of this call."""
        given = [kwargs.get(name) for name in INPUTS]
        tensors = [t for t in (*args, *given, *kwargs.values()) if isinstance(t, Tensor) and t.dim() > 0]
        if not tensors:
            return
        size, count = tensors[0].shape[0], len(self.names)
        if size == 0 or (size != count if self.exact else size % count):
            raise ValueError(
                f"adapter_names must have one name per sample, got {count} names for an input of shape "
                f"{list(tensors[0].shape)}"
            )
        self.size, self.tokens = size, tensors[0].shape[1] if tensors[0].dim() > 1 else 0

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
        if self.length_first and x.dim() > 2 and x.shape[1] in sizes:
            raise ValueError(
                f"adapter_names: a layer got an input of shape {list(x.shape)}, and parts of this model have "
                "batch_first=False, so that it cannot be known which dimension is the batch: pad the length"
            )
        if self.with_gradients and not torch.compiler.is_compiling():
            _refuse_checkpointing(x)
        key = x.shape[0], x.device
        if key not in self._rows:
            repeat = x.shape[0] // count
            found: dict[str, list[int]] = {}
            for i, name in enumerate(self.names):
                found.setdefault(name, []).extend(range(i * repeat, (i + 1) * repeat))
            self._rows[key] = {name: torch.tensor(rows, device=x.device) for name, rows in found.items()}
        return self._rows[key]


def _refuse_checkpointing(x: Tensor) -> None:
    """Checkpointing runs the layers once more in backward, when the batch is over and its names are gone."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if (hooks and "checkpoint" in getattr(hooks[0], "__qualname__", "")) or (
        x.requires_grad and not torch.is_grad_enabled()  # reentrant checkpointing runs its forward under no_grad
    ):
        raise ValueError(CHECKPOINTING)


def add_updates(
    batch: MixedBatch, x: Tensor, result: Tensor, adapters: Iterable[str], update: Callable[[Tensor, str], Tensor]
) -> Tensor:
    """`result`, the base layer's, plus ``update(rows of x, name)`` for the rows of each name that is in `adapters`."""
    for name, rows in batch.rows(x).items():
        if name in adapters:
            result = result.index_add(0, rows, update(x.index_select(0, rows), name).to(result.dtype))
    return result


@contextlib.contextmanager
def mixed_batch(
    model: nn.Module, layers: Sequence[nn.Module], names: Sequence[str] | None, exact: bool = False
) -> Iterator[None]:
    """While this lasts, calls of `model` take `names`, one per sample, instead of the active adapters (None: as ever).

    Args:
        layers: the adapted layers in `model`: those with an attribute ``mixed_batch``, ``randlora_lambda`` and
            ``merged_adapters``.
        exact: a call's batch must have as many samples as there are names; else it may be a multiple (beam search).

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
    modules = list(model.modules())
    if model.training and torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", 0) for m in modules):
        raise ValueError(CHECKPOINTING)
    inside = {id(part) for name, m in model.named_modules() if name.endswith("experts") for part in m.modules()}
    if any(id(layer) in inside for layer in layers):
        raise ValueError("adapter_names: experts get the tokens that are routed to them, not samples")
    attentions = [m for m in modules if isinstance(m, nn.MultiheadAttention)]
    projections = {id(part) for attention in attentions for part in attention.modules()}  # get the batch first
    length_first = any(not attention.batch_first for attention in attentions)
    inner, outer = MixedBatch(names, exact), MixedBatch(names, exact, length_first)
    hooks = [model.register_forward_pre_hook(batch.see, with_kwargs=True) for batch in (inner, outer)]
    try:
        for layer in layers:
            layer.mixed_batch = inner if id(layer) in projections else outer
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for layer in layers:
            layer.mixed_batch = None
