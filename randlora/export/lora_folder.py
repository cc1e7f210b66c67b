"""The folder of an adapter of LoRA, as PEFT writes and loads it: what its two files hold, and writing them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import card, trained
from ..checkpoint.biases import plain
from ..checkpoint.layout import CONFIG_NAME, PARAMETERS, PREFIX, WEIGHTS_NAME
from ..checkpoint.replace import replace_files
from ..checkpoint.writing import write_tensors
from ..layers.linears import is_transposed
from ..layers.randlora_layer import RandLoraLayer
from ..model.model import RandLoraModel
from ..names import plain_name
from .source import AdaptedByPeft
from .update import Factors


def check_output(folder: Path) -> None:
    """Raises ``ValueError`` for a folder that holds something, or that is none."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {str(folder)!r} is a file: name a folder")
    if folder.is_dir() and (found := sorted(path.name for path in folder.iterdir())):
        raise ValueError(f"output {str(folder)!r} holds {found[0]!r} already: name a folder that is new or empty")


def beside(
    model: RandLoraModel | AdaptedByPeft, adapter: str, layers: Mapping[str, RandLoraLayer]
) -> dict[str, Tensor]:
    """Copies of the trained biases and modules to save, by their names in the file; all that is trained is checked.

    Raises:
        ValueError: numbers that are missing or not finite, or that are spread over processes.
    """
    saved = model.saved if isinstance(model, AdaptedByPeft) else None
    found = trained.sources(model.model, adapter, model.peft_config[adapter], layers, saved)
    with torch.no_grad():  # inference tensors are not for autograd
        values = trained.values(model.model, adapter, found, None)
        trained.check(adapter, values, found)
        others = {key: value for key, value in values.items() if key.rpartition(".")[2] not in PARAMETERS}
        return trained.copies(others)


def tensors_of(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """A and B of the layers by their names in the file."""
    return {
        f"{PREFIX}{plain_name(name)}.lora_{which}.weight": tensor
        for name, both in factors.items()
        for which, tensor in zip("AB", both, strict=True)
    }


def settings(
    model: RandLoraModel | AdaptedByPeft,
    adapter: str,
    layers: Mapping[str, RandLoraLayer],
    ranks: Mapping[str, int],
) -> dict[str, Any]:
    """What ``adapter_config.json`` says. ``lora_alpha`` is the rank: A and B hold the scaling, which is 1."""
    config, most = model.peft_config[adapter], max(ranks.values())
    other = {plain_name(name): rank for name, rank in ranks.items() if rank != most}
    pattern = _exact_pattern(other, [plain_name(name) for name in layers])
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "auto_mapping": config.auto_mapping,
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.revision,
        "inference_mode": True,
        "r": most,
        "lora_alpha": most,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "lora_dropout": config.randlora_dropout,
        "target_modules": _targets(model.model, layers),
        "fan_in_fan_out": all(is_transposed(layer.get_base_layer()) for layer in layers.values()),
        "bias": "lora_only" if config.bias == "randlora_only" else config.bias,
        "modules_to_save": None if config.modules_to_save is None else sorted(config.modules_to_save),
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def write(
    folder: Path,
    model: RandLoraModel | AdaptedByPeft,
    settings: Mapping[str, Any],
    tensors: dict[str, Tensor],
    result: Any,
) -> None:
    """Write all of it, or nothing: the config comes last, and without it the folder is no adapter."""
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    about = card.text_for_lora(model.model, settings["base_model_name_or_path"], result.as_markdown())
    writers: dict[str, Callable[[Path], Any]] = {
        WEIGHTS_NAME: partial(write_tensors, tensors=tensors, metadata={"format": "pt"}),
        CONFIG_NAME: partial(Path.write_text, data=text, encoding="utf-8"),
        card.CARD_NAME: partial(Path.write_text, data=about, encoding="utf-8"),
    }
    replace_files(folder, writers, described_by=CONFIG_NAME)


def _targets(model: nn.Module, layers: Mapping[str, RandLoraLayer]) -> list[str] | str:
    """``target_modules`` that mean exactly these layers: last names, whole names, or a pattern."""
    wanted = {plain(name) for name in layers}
    # As in a model without adapters, where these are modules; PEFT asks all of them, whatever they are.
    inside = tuple(f"{name}." for name in layers)
    names = {
        plain(name)
        for name, _ in model.named_modules()
        if not name.startswith(inside) and "modules_to_save" not in name.split(".")
    }
    for targets in (sorted({name.rpartition(".")[2] for name in wanted}), sorted(wanted)):
        endings = tuple(f".{target}" for target in targets)
        if {name for name in names if name in targets or name.endswith(endings)} == wanted:
            return targets
    return "(?:" + "|".join(map(re.escape, sorted(wanted))) + ")"


def _exact_pattern(ranks: dict[str, int], names: list[str]) -> dict[str, int]:
    """`ranks` with keys that PEFT, which takes them for patterns of how a name ends, finds for these layers only."""
    try:
        if all([name for name in names if re.match(rf"(.*\.)?({key})$", name)] == [key] for key in ranks):
            return ranks
    except re.error:
        pass
    return {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
