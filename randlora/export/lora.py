"""An adapter of RandLoRA as one of LoRA: ``to_lora``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checks import require_float, require_size
from ..dtypes import FLOATS
from ..layers.attention import MultiheadAttention
from ..layers.randlora_layer import RandLoraLayer
from ..model.model import RandLoraModel
from ..model.parts import layers_with
from . import lora_folder, on_inputs
from .source import AdaptedByPeft, model_of_folder, model_of_peft
from .table import VLLM_RANKS, LoraExport, notes_of
from .update import Factors, LayerUpdate

SERVED = VLLM_RANKS[-1]


def to_lora(
    model_or_folder: nn.Module | str | os.PathLike,
    output: str | os.PathLike,
    rank: int | None = None,
    energy: float | None = None,
    adapter: str = "default",
    base_model: nn.Module | str | os.PathLike | None = None,
    *,
    per_layer: bool = False,
    dtype: torch.dtype = torch.float32,
    inputs: Any = None,
    progressbar: bool = False,
) -> LoraExport:
    """Write an adapter as a folder of LoRA, as PEFT writes and loads it, and tell what that loses.

    An update is a product of rank ``P = num_bases * r`` at most. Where P, or the smaller side of the layer, is not
    above the rank asked for, LoRA's B and A are its two factors, and the export is exact. Otherwise they are the best
    approximation of that rank, by truncated SVD. The scaling is inside A and B: ``lora_alpha`` is the rank. Trained
    biases and ``modules_to_save`` are written beside, as PEFT does. The model is not changed, and the update of one
    layer at most is in memory.

    Args:
        model_or_folder: an adapted model, whose base weights may be on meta, one of PEFT that randlora computes
            (``randlora.integrations.peft``), or the folder of a saved adapter (or an id of the Hugging Face hub), for
            which the base model's config is needed.
        output: the folder to write, which must not exist or be empty.
        rank: of LoRA. Default: that of the updates, which is exact, where it is at most 512 in all layers.
        energy: in place of `rank` the smallest one that keeps this share, at most 1, of the sum of squares of each
            layer's update.
        adapter: the adapter's name in the model, or the one that it had when it was saved: others than ``"default"``
            are in a folder of that name.
        base_model: for a folder: the model that it adapts, or its name or folder; default: what the adapter's config
            says.
        per_layer: a rank for each layer, no larger than it needs, in ``rank_pattern``. Default: one for all, the
            largest that is needed, or `rank`; layers that need less are padded with zeros.
        dtype: of the LoRA file: float32, bfloat16, float16 or float64.
        inputs: of the model, a tensor, a tuple, or a dict of keyword arguments, to compare its output on with the
            adapter and with LoRA in its place. The base model must have its numbers; for a folder it is loaded.
        progressbar: show one, by tqdm.

    Returns:
        A dict with ``adapter``, ``rank``, ``dtype``, ``exact`` (nothing but rounding is lost), ``energy`` and ``error``
        (kept share of the squares of all updates, and relative Frobenius error of them together),
        ``file_bytes``, ``layers``, ``notes``, and with `inputs` ``logits``. Each layer has ``name``, ``in_features``,
        ``out_features``, ``update_rank`` (the most that the update can have), ``rank``, ``exact``, ``energy`` and
        ``error``, measured on the numbers as they are written. ``str()`` is a table.

    Raises:
        TypeError, ValueError: arguments that do not fit; layers that LoRA's format does not have (weights of fused
            experts, projections of a ``nn.MultiheadAttention``, one layer in several places); numbers that are not
            finite, are missing, or do not fit into `dtype`. Nothing is written then.
        OSError: the folder cannot be written; what was there is there again.
    """
    output = Path(output)
    rank = _check_arguments(rank, energy, dtype, per_layer)
    lora_folder.check_output(output)
    model: RandLoraModel | AdaptedByPeft | None
    if isinstance(model_or_folder, (str, os.PathLike)):
        model = model_of_folder(model_or_folder, adapter, base_model, with_numbers=inputs is not None)
    else:
        model = (
            model_or_folder if isinstance(model_or_folder, RandLoraModel) else model_of_peft(model_or_folder, adapter)
        )
        if model is None:
            raise TypeError(
                "model_or_folder must be a randlora.RandLoraModel, a model with accelerated RandLoRA layers of PEFT, "
                f"or the folder of a saved adapter, got {type(model_or_folder).__name__}"
            )
        if base_model is not None:
            raise ValueError("base_model is for the folder of an adapter: this model has its own")
    model._check(adapter)
    layers = layers_with(model.model, adapter)
    _check_layers(model.model, layers, adapter)
    beside = lora_folder.beside(model, adapter, layers)
    if inputs is not None:
        on_inputs.check(model)

    with torch.no_grad():
        ranks = _ranks(layers, adapter, rank, energy, progressbar)
        common = None if per_layer else _common(rank, ranks)
        rows, factors = [], {}
        for name, layer in _bar(layers, "factors", progressbar):
            wanted = ranks[name] if common is None else common
            row, factors[name] = _exported(name, layer, adapter, wanted, dtype, padded=common is not None)
            rows.append(row)
        found = {} if inputs is None else {"logits": on_inputs.compare(model, adapter, layers, factors, inputs)}
    tensors = lora_folder.tensors_of(factors) | beside
    settings = lora_folder.settings(model, adapter, layers, {name: len(f.A) for name, f in factors.items()})
    energies = [row.pop("_norm") ** 2 for row in rows]
    lost = [row.pop("_lost") ** 2 for row in rows]
    share = sum(lost) / sum(energies) if any(energies) else 0.0
    result = LoraExport(
        adapter=adapter,
        rank=settings["r"],
        dtype=str(dtype).removeprefix("torch."),
        exact=all(row["exact"] for row in rows),
        energy=1 - share,
        error=share**0.5,
        file_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        layers=rows,
        **found,
    )
    result["notes"] = notes_of(result, settings, energy)
    lora_folder.write(output, model, settings, tensors, result)
    return result


def _check_arguments(rank: Any, energy: Any, dtype: Any, per_layer: Any) -> int | None:
    """`rank` as a number of Python."""
    if rank is not None and energy is not None:
        raise ValueError(f"give rank or energy, not both, got rank={rank!r} and energy={energy!r}")
    if energy is not None and not 0 < require_float("energy", energy) <= 1:
        raise ValueError(f"energy must be above 0 and at most 1, the share of the update that is kept, got {energy!r}")
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype!r}")
    if not isinstance(per_layer, bool):
        raise TypeError(f"per_layer must be True or False, got {per_layer!r}")
    return None if rank is None else require_size("rank", rank)


def _check_layers(model: nn.Module, layers: Mapping[str, RandLoraLayer], adapter: str) -> None:
    """Raises ``ValueError`` for layers that cannot be written so that every loader of LoRA computes the same.

    So for numbers that are nowhere, or in parts with several processes, which would wait for each other.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for path, layer in layers.items():
        why = None
        if layer.num_experts is not None:
            why = "is the weight of fused experts, of which loaders of LoRA have no common format"
        elif isinstance(model.get_submodule(path.rpartition(".")[0]), MultiheadAttention):
            why = "belongs to a torch.nn.MultiheadAttention, whose projections have no layers that LoRA could be on"
        elif len(known := names[id(layer)]) > 1:
            why = f"is one layer with {' and '.join(known[1:])}, and PEFT's LoRA would be on its first use only"
        if why is not None:
            raise ValueError(f"{path!r} {why}: merge the adapter into the model instead")
        layer._trained_whole(adapter, torch.device("cpu"))


def _ranks(
    layers: Mapping[str, RandLoraLayer], adapter: str, rank: int | None, energy: float | None, progressbar: bool
) -> dict[str, int]:
    """What each layer needs: the rank that keeps the energy, or the one of its update, up to `rank`."""
    if energy is not None:
        bar = _bar(layers, "ranks", progressbar)
        return {name: LayerUpdate(layer, adapter).rank_for(energy) for name, layer in bar}
    full = {
        name: min(layer.num_bases[adapter] * layer.r[adapter], layer.in_features, layer.out_features)
        for name, layer in layers.items()
    }
    if rank is None and (largest := max(full.values())) > SERVED:
        name = max(full, key=lambda name: full[name])
        raise ValueError(
            f"the updates have rank up to {largest} ({name!r}), above the {SERVED} that servers take: give rank= or "
            f"energy=, which approximate (rank={largest} is exact), or merge the adapter into the model"
        )
    return {name: most if rank is None else min(most, rank) for name, most in full.items()}


def _common(rank: int | None, ranks: Mapping[str, int]) -> int:
    return max(ranks.values()) if rank is None else rank


def _exported(
    name: str, layer: RandLoraLayer, adapter: str, rank: int, dtype: torch.dtype, padded: bool
) -> tuple[dict[str, Any], Factors]:
    """A layer's row of the table, and its factors on the CPU in `dtype`, with zeros up to `rank` if `padded`."""
    update = LayerUpdate(layer, adapter, rank)
    A, B = (t.to(dtype) for t in update.factors(rank))
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"{name!r}: its update does not fit into {dtype}: give another dtype")
    norm, lost = update.norms(Factors(A, B))
    error = lost / norm if norm else 0.0
    row = {
        "name": name, "in_features": layer.in_features, "out_features": layer.out_features,
        "update_rank": update.rank, "rank": len(A), "exact": rank >= update.rank, "energy": 1 - error**2,
        "error": error, "_norm": norm, "_lost": lost,
    }  # fmt: skip
    more = rank - len(A) if padded else 0
    A, B = nn.functional.pad(A, (0, 0, 0, more)), nn.functional.pad(B, (0, more))
    return row, Factors(*(t.to("cpu", copy=True, memory_format=torch.contiguous_format) for t in (A, B)))


def _bar(layers: Mapping[str, RandLoraLayer], what: str, shown: bool) -> Iterable[tuple[str, RandLoraLayer]]:
    if not shown:
        return layers.items()
    from tqdm import tqdm

    bar: Iterable[tuple[str, RandLoraLayer]] = tqdm(layers.items(), desc=what, unit="layer")
    return bar
