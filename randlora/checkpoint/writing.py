"""Writing adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import injection
from ..bases import RandomBases
from ..config import CONFIG_NAME, OWN_PEFT_TYPE, RandLoraConfig
from ..injection import adapted_layers, saved_modules
from ..targets import peft_dims
from .layout import FORMAT, OWN_SETTINGS, PARAMETERS, PREFIX, WEIGHTS_NAME, write_text, write_whole

if TYPE_CHECKING:
    from ..model import RandLoraModel


def save(model: RandLoraModel, folder: str | os.PathLike, names: list[str], for_peft: bool | None = None) -> None:
    """Write the adapters `names`: ``"default"`` into `folder`, others into ``folder/<name>``.

    With ``save_projection=False`` a file holds the trained numbers and nothing else. Bases that came from a file, and
    so cannot be made again, are always written.

    Args:
        for_peft: True: raise ``ValueError``, with nothing written, where PEFT could not compute the same. None: write
            it so that PEFT refuses to load it. False: write no projections, whatever the config says.

    Raises:
        ValueError: see above; merged adapters are no reason. OSError: the folder cannot be written.
    """
    prepared = [(name, *_contents(model, name, for_peft)) for name in names]
    for name, config, tensors, metadata in prepared:
        target = Path(folder) if name == "default" else Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        # Metadata and parameters go together in one file; the config repeats what users look up.
        write_whole(target / WEIGHTS_NAME, lambda path, t=tensors, m=metadata: save_file(t, path, m))
        write_text(target / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def _contents(model: RandLoraModel, name: str, for_peft: bool | None) -> tuple[dict, dict[str, Tensor], dict[str, str]]:
    config = model.peft_config[name]
    layers = {path: layer for path, layer in adapted_layers(model.model).items() if name in layer.randlora_lambda}
    tensors = {
        f"{PREFIX}{path}.{part}": getattr(layer, part)[name] for path, layer in layers.items() for part in PARAMETERS
    }
    for path, module in saved_modules(model.model).items():
        if name in module.modules_to_save:
            state = module.modules_to_save[name].state_dict()
            tensors |= {f"{PREFIX}{path}.{key}": value for key, value in state.items()}
    tensors |= {f"{PREFIX}{key}": value for key, value in _biases(model.model, config.bias).items()}

    bases = next(iter(layers.values())).bases[name]
    slots = {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}
    dims = injection.required(config, slots)
    peft = peft_dims(model.model, config, layers)
    peft_bases = -(-peft[1] // config.r)
    given = bases.prng == "none"
    with_bases = given or (config.save_projection and for_peft is not False)
    reason = _misread(model, config, layers, bases, (*peft, peft_bases), with_bases)
    if for_peft and reason:
        raise ValueError(f"adapter {name!r} cannot be written for PEFT: {reason}")
    if with_bases:
        A, B = _projections(bases, (*peft, peft_bases) if not reason else dims)
        tensors |= {"base_model.randlora_A": A, "base_model.randlora_B": B}
    # A parameter on several modules (tied) is stored once; safetensors wants separate, contiguous memory.
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}

    values = config.to_dict()
    settings = {key: getattr(config, key) for key in OWN_SETTINGS} | {"prng": bases.prng}
    for key in OWN_SETTINGS:
        if not reason:
            values.pop(key, None)
    if values.pop("exclude_modules", None) is not None:
        values["target_modules"] = list(layers)  # PEFT has no exclude_modules
    values |= {"inference_mode": True, "save_projection": with_bases}
    if reason:
        values["peft_type"] = OWN_PEFT_TYPE
    described = {
        "format": FORMAT,
        "settings": settings,
        "seed": bases.seed,
        "r": config.r,
        "dims": dims,
        "fingerprint": bases.fingerprint(*dims),
    }
    return values, tensors, {"format": "pt", "randlora": json.dumps(described, sort_keys=True)}


def _misread(
    model: RandLoraModel,
    config: RandLoraConfig,
    layers: dict[str, Any],
    bases: RandomBases,
    peft: tuple[int, int, int],
    with_bases: bool,
) -> str:
    """Why PEFT would compute something else with this adapter, or an empty string."""
    for path in layers:
        if type(model.model.get_submodule(path.rpartition(".")[0])).__name__ == "MultiheadAttention":
            return f"{path} belongs to a torch.nn.MultiheadAttention, which PEFT's RandLoRA does not support"
    for path, layer in layers.items():
        n = -(-min(layer.in_features, layer.out_features) // config.r)
        if layer.randlora_lambda.keys() and config.num_bases not in (None, n):
            return f"num_bases={config.num_bases}, where PEFT always takes {n} at {path}"
    if not with_bases and (bases.prng == "philox" or (bases.max_dim, bases.min_dim, bases.num_bases) != peft):
        return (
            f"its bases (prng={bases.prng!r}) are not those that PEFT draws: it needs save_projection=True"
        )
    if with_bases and bases.prng != "philox" and (bases.max_dim, bases.min_dim, bases.num_bases) != peft:
        return f"its bases are of another size than PEFT's for these layers, {peft}"
    return ""


def _projections(bases: RandomBases, dims: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """A and B of unit variance in float32, in the size that PEFT allocates."""
    if bases.prng == "philox":
        bases = RandomBases(*dims[:2], bases.r, bases.kind, bases.seed, dims[2], sparsity=_free(bases))
    bases = bases.to(torch.float32) if bases.dtype != torch.float32 else bases
    return bases.A, bases.B


def _free(bases: RandomBases) -> float | None:
    return bases.sparsity if bases.kind in ("sparse", "very_sparse") else None


def _biases(model: nn.Module, mode: str) -> dict[str, Tensor]:
    if mode == "none":
        return {}
    if mode == "randlora_only":
        paths = [f"{path}.base_layer.bias" for path in adapted_layers(model)]
    else:
        paths = [n for n, _ in model.named_parameters() if n.endswith("bias") and ".modules_to_save." not in n]
    parameters = dict(model.named_parameters())
    return {path: parameters[path] for path in paths if path in parameters}
