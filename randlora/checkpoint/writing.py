"""Writing adapters."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import injection
from ..bases import RandomBases
from ..config import ALL_LINEAR, CONFIG_NAME, OWN_PEFT_TYPE, RandLoraConfig
from ..injection import adapted_layers, saved_modules
from ..layer import RandLoraLayer
from ..offload import with_numbers
from . import biases
from .for_peft import drawn_dims, exact_targets, misread
from .layout import FORMAT, METADATA_KEY, OWN_SETTINGS, PARAMETERS, PREFIX, WEIGHTS_NAME, checksum
from .replace import replace_files

if TYPE_CHECKING:
    from ..model import RandLoraModel


def save(model: RandLoraModel, folder: str | os.PathLike, names: list[str], for_peft: bool | None = None) -> None:
    """Write the adapters `names`: ``"default"`` into `folder`, others into ``folder/<name>``.

    With ``save_projection=False`` a file holds the trained numbers and nothing else. Bases that came from a file, and
    so cannot be made again, are always written. The same adapter always gives the same bytes.

    Args:
        for_peft: True: raise ``ValueError``, with nothing written, where PEFT could not compute the same. None: write
            it so that PEFT refuses to load it. False: write no projections, whatever the config says.

    Raises:
        ValueError: see above, or an adapter whose layers differ in what its one config says. OSError: the folder cannot
            be written.
    """
    prepared = [(name, *_contents(model, name, for_peft)) for name in names]
    for name, config, tensors, projections, metadata in prepared:
        target = Path(folder) if name == "default" else Path(folder) / name
        target.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        complete = _apart(tensors | projections())
        writers = {
            WEIGHTS_NAME: lambda path, t=complete, m=metadata: save_file(t, path, m),
            CONFIG_NAME: lambda path, text=text: path.write_text(text, encoding="utf-8"),
        }
        replace_files(target, writers, described_by=CONFIG_NAME)


def _contents(
    model: RandLoraModel, name: str, for_peft: bool | None
) -> tuple[dict, dict[str, Tensor], Callable[[], dict[str, Tensor]], dict[str, str]]:
    """The config, the trained numbers, what makes the projections (none are held before they are written), metadata."""
    config = model.peft_config[name]
    layers = {path: layer for path, layer in adapted_layers(model.model).items() if name in layer.randlora_lambda}
    bases = _same_everywhere(name, config, layers)
    slots = {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}
    dims = injection.required(config, slots)
    for_all = drawn_dims(model.model, config, layers)
    given = bases.prng == "none"
    with_bases = given or (config.save_projection and for_peft is not False)
    reason = misread(model.model, config, layers, bases, for_all, with_bases)
    if for_peft and reason:
        raise ValueError(f"adapter {name!r} cannot be written for PEFT: {reason}")
    if reason:
        with_bases = given  # only PEFT has a use for others

    tensors = _trained(model, name, config, layers)

    def projections() -> dict[str, Tensor]:
        made = _projections(bases, dims if reason else for_all) if with_bases else ()
        return dict(zip(("base_model.randlora_A", "base_model.randlora_B"), made, strict=False))

    free = bases.prng == "philox" and bases.kind in ("sparse", "very_sparse")
    chosen: dict[str, Any] = {
        "inference_mode": True,
        "save_projection": with_bases,
        "sparsity": bases.sparsity if free else None,
    }
    if config.exclude_modules is not None or str(config.target_modules).lower() == ALL_LINEAR:
        # PEFT has no exclude_modules, and another idea of all layers for models that are not of transformers.
        chosen |= exact_targets(model.model, layers)
    values = config.to_dict() | chosen
    for key in ("exclude_modules", "peft_version", "sparsity"):  # older PEFT does not know the first two
        if values.get(key) is None:
            values.pop(key, None)
    if reason:
        values["peft_type"] = OWN_PEFT_TYPE
    else:
        values = {key: value for key, value in values.items() if key not in OWN_SETTINGS}
    description = {
        "format": FORMAT,
        "config": asdict(config) | chosen,
        "prng": bases.prng,
        "dims": dims,
        "fingerprint": bases.fingerprint(*dims),
    }
    description["sha256"] = checksum(description, tensors)
    return values, tensors, projections, {METADATA_KEY: json.dumps(description, sort_keys=True)}


def _same_everywhere(name: str, config: RandLoraConfig, layers: dict[str, RandLoraLayer]) -> RandomBases:
    """The bases of an adapter whose layers are all as `config` says, or ``ValueError``."""
    bases = next(iter(layers.values())).bases[name]
    if bases.prng != "none":
        own = (config.r, config.kind, config.projection_prng_key, config.prng)
        if own != (bases.r, bases.kind, bases.seed, bases.prng):
            raise ValueError(
                f"adapter {name!r} cannot be saved: its config says (r, kind, seed, prng) = {own}, but its bases are "
                f"{bases}"
            )
    for path, layer in layers.items():
        if layer.bases[name] is not bases:
            raise ValueError(f"adapter {name!r} cannot be saved as one: it has other bases at {path!r}")
        expected = config.num_bases or -(-min(layer.in_features, layer.out_features) // config.r)
        for what, here, said in (
            ("r", layer.r[name], config.r),
            ("scaling", layer.scaling[name], config.randlora_alpha / config.r),
            ("num_bases", layer.num_bases[name], expected),
        ):
            if here != said:
                raise ValueError(
                    f"adapter {name!r} cannot be saved as one: at {path!r} its {what} is {here}, not the {said} of its "
                    "config"
                )
    return bases


def _trained(
    model: RandLoraModel, name: str, config: RandLoraConfig, layers: dict[str, RandLoraLayer]
) -> dict[str, Tensor]:
    tensors = {
        f"{PREFIX}{slot}.{part}": getattr(layer, part)[name] for slot, layer in layers.items() for part in PARAMETERS
    }
    saved = {path: m for path, m in saved_modules(model.model).items() if name in m.modules_to_save}
    for path, module in saved.items():
        state = module.modules_to_save[name].state_dict(keep_vars=True)
        tensors |= {f"{PREFIX}{path}.{key}": value for key, value in state.items()}
    for path, bias in biases.trained(model.model, config.bias, layers, saved).items():
        owner = path.rpartition(".")[0]
        # As in a model that has this adapter only.
        tensors[f"{PREFIX}{owner}.base_layer.bias" if owner in layers else f"{PREFIX}{path}"] = bias
    return with_numbers(model.model, tensors)


def _projections(bases: RandomBases, dims: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The leading part of unit-variance A and B with these dimensions; in float32, or as they were given."""
    max_dim, min_dim, num_bases = dims
    if bases.prng == "philox":
        bases = RandomBases(
            max_dim, min_dim, bases.r, bases.kind, bases.seed, num_bases,
            sparsity=bases.sparsity if bases.kind in ("sparse", "very_sparse") else None,
        )  # fmt: skip
    A, B = bases.given or bases.draw(torch.float32, torch.device("cpu"))
    if bases.scale != 1.0:
        A, B = A * math.sqrt(bases.scale), B * math.sqrt(bases.scale)
    return A[:, :, :min_dim], B[:max_dim, :num_bases]


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with memory of its own: safetensors writes no tied or partial tensors."""
    seen: set[int] = set()
    result = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[key] = tensor
    return result
