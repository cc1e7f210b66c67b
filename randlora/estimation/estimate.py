"""What an adapter will cost, told before training.

Layers, bases, strategies and operations come from the functions that adapt and run a model
(:mod:`randlora.model.adapter_plan`, :mod:`randlora.bases.patterns`, :mod:`randlora.planner`); the inputs that layers
share from a call without numbers (:mod:`randlora.estimation.trial_call`). The counting is in
:mod:`randlora.estimation.methods`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..bases.definition import KINDS, PEFT_KINDS
from ..bases.random_bases import RandomBases
from ..checks import require_dtype, require_int
from ..config import RandLoraConfig
from ..distributed.zero3 import shape_of
from ..model.adapter_plan import plan_adapter
from ..model.of_config import first_line
from ..model.parts import adapted_layers
from .lora import lora
from .methods import randlora
from .step import Step, beside, layers_of, writes_projections
from .table import table
from .trial_call import trial_call

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
    tokens = require_int("tokens", tokens, 1)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if adapted_layers(model):
        raise ValueError("this model is adapted already: estimate takes it as it was before")
    config = RandLoraConfig.of(config)
    kinds = _kinds(config, kinds)
    if config.strategy == "merged" and config.randlora_dropout > 0:
        raise ValueError(f"strategy='merged' takes no dropout, got randlora_dropout={config.randlora_dropout}")
    if autocast is not None:
        require_dtype("autocast", autocast)
    # These bases only stand in, so that no others of this process grow.
    plan = plan_adapter(model, config, RandomBases(1, 1, config.r))
    layers = layers_of(model, plan, autocast)

    notes: list[str] = []
    calls = {}
    try:
        calls = trial_call(model, plan, tokens, inputs)
    except Exception as error:  # whatever a foreign model makes of a call without numbers
        why = first_line(error)
        notes.append(
            f"saved activations are an upper bound, an input of its own for every layer: no trial call ({why})"
        )
    else:
        if missing := [layer.name for layer in layers if layer.name not in calls]:
            notes.append(f"not called in the trial call, and counted as called once: {', '.join(missing[:3])}" + (
                f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            ))  # fmt: skip
    called = [replace(layer, calls=calls.get(layer.name)) for layer in layers]
    step = Step(tokens, _device(model, device), called, keep_bases)

    others = beside(model, plan)
    projections = writes_projections(model, plan)
    methods = {kind: randlora(step, plan, kind, others, projections) for kind in kinds}
    methods[LORA] = lora(step, plan, others)
    result = Estimate(
        tokens=tokens,
        device=str(step.device),
        dtype=str(Counter(layer.dtype for layer in layers).most_common(1)[0][0]).removeprefix("torch."),
        layers=len(layers),
        model_parameters=sum(shape_of(p).numel() for p in model.parameters()),
        kind=config.kind,
        inputs="counted" if calls else "upper bound",
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


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is not None:
        return torch.device(device)
    found = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if found.type == "meta" else found


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
