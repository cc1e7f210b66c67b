"""What an adapter will cost, told before training.

Layers, bases, strategies and operations come from the functions that adapt and run a model
(:mod:`randlora.model.adapter_plan`, :mod:`randlora.bases.patterns`, :mod:`randlora.planner`); the inputs that layers
share from a call without numbers (:mod:`randlora.estimation.trial_call`). The counting is in
:mod:`randlora.estimation.count` and :mod:`randlora.estimation.methods`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..bases.definition import KINDS, PEFT_KINDS
from ..config import RandLoraConfig
from ..distributed.zero3 import shape_of
from .count import count
from .table import table

LORA = "lora"


class Estimate(dict):
    """The result of :func:`estimate`: a dict of numbers, strings and lists, fit for ``json``; ``str()`` is a table."""

    def __str__(self) -> str:
        return table(self)


def estimate(
    model: nn.Module,
    config: Any,
    tokens: int,
    *,
    kinds: Sequence[str] | str | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    inputs: Any = None,
    keep_bases: bool = True,
) -> Estimate:
    """What training `model` with `config` will take, for RandLoRA of each kind and for LoRA with as many parameters.

    Nothing is changed and no bases are generated; the model may be on the meta device.

    Args:
        config: as for :func:`randlora.get_peft_model`; the layers that it would adapt are counted.
        tokens: tokens of one step in all, batch times sequence; every layer is taken to see all of them.
        kinds: kinds of bases to tell of; default: all of them (with ``prng="peft"``: those that PEFT has).
        device: where it will run; default: where the model is, and for one on the meta device CUDA if there is any.
        autocast: dtype of ``torch.autocast``, where the model is trained under it.
        inputs: the model's arguments (a tensor, a tuple, or a dict of keyword arguments; only their shapes matter), to
            see which layers share an input. Most models of transformers do without.
        keep_bases: False: as after :func:`randlora.keep_bases` ``(model, False)``, for the kinds that it is for.

    Returns:
        A dict with ``tokens``, ``device``, ``dtype`` (of most layers' products), ``layers``, ``model_parameters``,
        ``kind`` (the config's), ``inputs`` (``"counted"`` or ``"upper bound"``), ``notes``, and ``methods``: from
        the kinds and ``"lora"`` to dicts of

        - ``trainable_parameters``: with ``modules_to_save`` and biases, where the config trains them.
        - ``bases_bytes``, ``bases_form`` (``"dense"``, ``"signs"``, ``"bits"``, ``"planes"``, ``"lists"``,
          ``"seed"``): as the device keeps them. The positions in lists are random in number: their expected value.
        - ``saved_bytes``: kept from forward to backward beyond what the frozen model keeps, without checkpointing.
        - ``workspace_bytes``: the temporaries of the layer that takes most, which come and go.
        - ``multiply_adds``: of a step, forward and backward, beyond those of the frozen layers.
        - ``forward_multiply_adds``: the forward pass's part of them, which checkpointing computes once more.
        - ``optimizer_bytes``: AdamW's two moments.
        - ``file_bytes``, ``file_bytes_without_projections``: of the adapter's folder.
        - ``shapes``: per shape of layer ``in_features``, ``out_features``, ``num_bases``, ``count`` (calls per step),
          ``input_gradient`` (whether it is needed) and the strategies ``forward`` and ``backward``.

        LoRA is on the same layers, with the same modules and biases beside it, and computed as PEFT does. It has a
        ``rank``: the one whose number of parameters is nearest.

    Raises:
        TypeError, ValueError: arguments that do not fit, and whatever :func:`randlora.get_peft_model` would raise.
    """
    config = RandLoraConfig.of(config)
    kinds = _kinds(config, kinds)
    counted = count(model, config, tokens, device=device, autocast=autocast, inputs=inputs, keep_bases=keep_bases)
    step, notes = counted.step, list(counted.notes)
    methods = {kind: counted.randlora(kind) for kind in kinds}
    methods[LORA] = counted.lora()
    result = Estimate(
        tokens=tokens,
        device=str(step.device),
        dtype=str(step.dtype).removeprefix("torch."),
        layers=len(step.layers),
        model_parameters=sum(shape_of(p).numel() for p in model.parameters()),
        kind=config.kind,
        inputs="counted" if counted.calls else "upper bound",
        methods=methods,
        notes=notes,
    )
    notes += _notes(result)
    return result


def _kinds(config: RandLoraConfig, kinds: Sequence[str] | str | None) -> list[str]:
    known = KINDS if config.prng == "philox" else PEFT_KINDS
    asked = list(dict.fromkeys([kinds] if isinstance(kinds, str) else kinds or known))
    for kind in asked:
        if kind not in known:
            raise ValueError(f"kinds must be among {', '.join(known)} with prng={config.prng!r}, got {kind!r}")
    # Settings that one of them does not take are found before the model is looked at.
    if config.num_bases is not None and config.prng != "philox":
        raise ValueError(f"prng={config.prng!r} has PEFT's number of bases only, got num_bases={config.num_bases}")
    return asked


def _notes(result: Estimate) -> list[str]:
    methods = result["methods"]
    first, other = next(iter(methods.values())), methods[LORA]
    notes = [
        f"LoRA: rank {other['rank']}, whose {other['trainable_parameters']:,} trained parameters are nearest to "
        f"{first['trainable_parameters']:,}; on the same layers, computed as PEFT does"
    ]
    lists = [kind for kind, values in methods.items() if values["bases_form"] == "lists"]
    planes = [kind for kind, values in methods.items() if values["bases_form"] == "planes"]
    if lists:
        notes.append(f"{', '.join(lists)}: bases are lists of random length, bytes and operations expected values")
    signs = [kind for kind, values in methods.items() if values["bases_form"] == "signs"]
    if weighed := signs + planes + lists:
        notes.append(f"{', '.join(weighed)}: additions in place of products are weighed as the planner does")
    if result["inputs"] == "counted":
        notes.append("saved activations: each input that nothing else keeps, once for all layers that share it")
    if first["file_bytes"] != first["file_bytes_without_projections"]:
        notes.append("the bases in the file are for PEFT: save_projection=False leaves them out")
    return notes
