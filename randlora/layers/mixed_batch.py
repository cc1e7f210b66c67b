"""A batch of mixed adapters: every sample goes through its own adapter, the base product is computed once for all.

``with mixed_batch(model, parts, names):`` holds the names, one per sample, for the calls of `model` inside it. Each
adapted layer then adds, per adapter, the update of that adapter's rows (:func:`add_updates`); a module that every
adapter has a copy of runs each copy on its adapter's rows (:func:`run_apart`). PEFT has this for LoRA
(``adapter_names=``, S-LoRA and Punica have kernels for it) and ignores it for RandLoRA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

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
        length_first: parts of the model have the batch as their second dimension.
    """

    def __init__(self, names: Sequence[str], length_first: bool = False) -> None:
        self.names, self.length_first = tuple(names), length_first
        self.repeat, self.tokens = 1, 0  # repeat: ``generate`` has put this many copies of each sample in a row
        self.with_gradients = torch.is_grad_enabled()
        self._only: str | None = None
        self._rows: dict[tuple[int, torch.device], dict[str, Tensor]] = {}

    def see(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook of the model: notes how many tokens this call has and checks how many samples."""
        mappings = [kwargs, *(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Mapping))]
        named = [mapping.get(name) for name in INPUTS for mapping in mappings]
        values = [value for mapping in mappings for value in mapping.values()]
        tensors = [t for t in (*args, *named, *values) if isinstance(t, Tensor) and t.dim() > 0]
        if not tensors:
            return
        if tensors[0].shape[0] != len(self.names) * self.repeat:
            repeated = f", of which generate() has made {self.repeat} copies each" if self.repeat > 1 else ""
            raise ValueError(
                f"adapter_names must have one name per sample, got {len(self.names)} names{repeated} for an input of "
                f"shape {list(tensors[0].shape)}"
            )
        self.tokens = tensors[0].shape[1] if tensors[0].dim() > 1 else 0

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[None]:
        """While this lasts, all rows are `name`'s: its samples alone go through a module of its own."""
        before, self._only = self._only, name
        try:
            yield
        finally:
            self._only = before

    def rows(self, x: Tensor) -> dict[str, Tensor]:
        """Adapter name -> indices along x's first dimension. Raises ``ValueError`` if samples cannot be told apart."""
        if self._only is not None:
            return {self._only: torch.arange(x.shape[0], device=x.device)}
        count = len(self.names)
        sizes = {count, count * self.repeat}
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


class Mixable(Protocol):
    """What can take a mixed batch: an adapted layer, or what stands for a module that every adapter has a copy of."""

    mixed_batch: MixedBatch | None
    """The batch that is running. None: the active adapters act on all samples."""

    def mixable_adapters(self) -> Collection[str]:
        """Names of the adapters that it has. Raises ``ValueError`` while some are merged and so act on all samples."""
        ...


def add_updates(
    batch: MixedBatch, x: Tensor, result: Tensor, adapters: Iterable[str], update: Callable[[Tensor, str], Tensor]
) -> Tensor:
    """`result`, the base layer's, plus ``update(rows of x, name)`` for the rows of each name that is in `adapters`."""
    for name, rows in batch.rows(x).items():
        if name in adapters:
            result = result.index_add(0, rows, update(x.index_select(0, rows), name).to(result.dtype))
    return result


def run_apart(
    batch: MixedBatch, kind: str, call: Callable[[str, tuple, dict], Any], args: tuple, kwargs: dict
) -> Tensor:
    """Each name's rows of the one tensor in `args` and `kwargs` through ``call(name, args, kwargs)``, put together.

    For modules that every adapter has a copy of, of class `kind`. Raises ``TypeError`` where it cannot be known what
    belongs to which sample: other tensors among the arguments, or a result that is no tensor.
    """
    given = {**dict(enumerate(args)), **kwargs}
    places = [place for place, value in given.items() if isinstance(value, Tensor)]
    if len(places) != 1:
        raise TypeError(
            f"adapter_names: {kind} of modules_to_save must be called with its input and no other tensors, got "
            f"{len(places)} tensors"
        )
    x = given[places[0]]
    parts, order = [], []
    for name, rows in batch.rows(x).items():
        given[places[0]] = x.index_select(0, rows)
        with batch.only(name):
            part = call(name, tuple(given[i] for i in range(len(args))), {key: given[key] for key in kwargs})
        if not isinstance(part, Tensor) or part.shape[:1] != rows.shape:
            got = f"shape {list(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(
                f"adapter_names: {kind} of modules_to_save must return a tensor with a row per sample, got {got} for "
                f"{len(rows)} rows"
            )
        parts.append(part)
        order.append(rows)
    return torch.cat(parts).index_select(0, torch.cat(order).argsort())


@contextlib.contextmanager
def _counted_repetitions(model: nn.Module, batches: Sequence[MixedBatch]) -> Iterator[None]:
    """Let `batches` know when transformers' ``generate`` repeats the samples, for beams and for several sequences.

    It has one method for that, which runs after the encoder of a model that has one. Nothing in the calls of the model
    tells, neither an argument nor the number of samples.
    """
    method = "_expand_inputs_for_generation"
    shadowed = [(m, vars(m).get(method)) for m in model.modules() if callable(getattr(type(m), method, None))]

    def counting(original: Callable) -> Callable:
        def expand(*args: Any, **kwargs: Any) -> Any:
            for batch in batches:
                batch.repeat = kwargs.get("expand_size", args[0] if args else 1)
            return original(*args, **kwargs)

        return expand

    try:
        for module, _ in shadowed:
            vars(module)[method] = counting(getattr(module, method))
        yield
    finally:
        for module, before in shadowed:
            vars(module).pop(method, None)
            if before is not None:
                vars(module)[method] = before


@contextlib.contextmanager
def mixed_batch(model: nn.Module, parts: Sequence[Mixable], names: Sequence[str] | None) -> Iterator[None]:
    """While this lasts, calls of `model` take `names`, one per sample, instead of the active adapters (None: as ever).

    Where transformers' ``generate`` repeats samples, the names are repeated with them.

    Args:
        parts: all of `model` that adapters have a share in.

    Raises:
        TypeError, ValueError: names that no part knows, merged layers, layers of experts, or gradient checkpointing
            while training, which would run the layers once more after the batch is over.
    """
    if names is None:
        yield
        return
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"adapter_names must be a list of names, one per sample, got {names!r}")
    known = {name for part in parts for name in part.mixable_adapters()}
    if not names or (unknown := sorted(set(names) - known - {BASE})):
        got = ", ".join(unknown) if names else "an empty list"
        raise ValueError(f"adapter_names must be {BASE!r} or one of {', '.join(sorted(known))}, got {got}")
    modules = list(model.modules())
    if model.training and torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", 0) for m in modules):
        raise ValueError(CHECKPOINTING)
    refuse_experts(model, parts)
    attentions = [m for m in modules if isinstance(m, nn.MultiheadAttention)]
    projections = {id(part) for attention in attentions for part in attention.modules()}  # get the batch first
    length_first = any(not attention.batch_first for attention in attentions)
    inner, outer = MixedBatch(names), MixedBatch(names, length_first)
    hooks = [model.register_forward_pre_hook(batch.see, with_kwargs=True) for batch in (inner, outer)]
    try:
        for part in parts:
            part.mixed_batch = inner if id(part) in projections else outer
        with _counted_repetitions(model, (inner, outer)):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for part in parts:
            part.mixed_batch = None


def refuse_experts(model: nn.Module, parts: Iterable[object]) -> None:
    """Raises ``ValueError`` if one of `parts` is a module inside a mixture of experts, which gets no whole samples."""
    inside = {id(part) for name, m in model.named_modules() if name.endswith("experts") for part in m.modules()}
    if any(id(part) in inside for part in parts):
        raise ValueError("adapter_names: experts get the tokens that are routed to them, not samples")
