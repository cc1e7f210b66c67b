"""Writing adapters."""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..bases.definition import bases_for_full_rank
from ..bases.random_bases import RandomBases
from ..config import ALL_LINEAR, RandLoraConfig
from ..distributed.zero3 import gathered, shape_of
from ..layers.offload import with_numbers
from ..layers.randlora_layer import RandLoraLayer
from ..model.adapter_plan import required
from ..model.parts import adapted_layers, is_bias, saved_modules
from ..names import plain_name
from . import biases
from .for_peft import drawn_dims, exact_targets, misread
from .layout import (
    CONFIG_NAME,
    FORMAT,
    METADATA_KEY,
    OWN_PEFT_TYPE,
    OWN_SETTINGS,
    PARAMETERS,
    PREFIX,
    WEIGHTS_NAME,
    check_numbers,
    checksum,
)
from .replace import replace_files

if TYPE_CHECKING:
    from ..model.adapters import Adapters


def save(
    model: Adapters,
    folder: str | os.PathLike,
    names: list[str],
    for_peft: bool | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapters `names`: ``"default"`` into `folder`, others into ``folder/<name>``.

    With ``save_projection=False`` a file holds the trained numbers and nothing else. Bases that came from a file, and
    so cannot be made again, are always written. The same adapter always gives the same bytes. All numbers are copied
    first: what is written is what was checked, whatever other threads do to the model meanwhile.

    Args:
        for_peft: True: raise ``ValueError``, with nothing written, where PEFT could not compute the same. None: write
            it so that PEFT refuses to load it. False: write no projections, whatever the config says.
        state_dict: the model's, to take the numbers from, as it is gathered from processes that hold a part each.

    Raises:
        ValueError: see above; an adapter whose layers differ in what its one config says; NaN, infinity and whatever
            else could not be loaded again, by name. Nothing is written then.
        OSError: the folder cannot be written, or the disk is full; the old files are as they were then.
    """
    prepared = [(name, *_contents(model, name, for_peft, state_dict)) for name in names]
    for name, config, tensors, projections, metadata in prepared:
        target = Path(folder) if name == "default" else Path(folder) / name
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        complete = tensors | _apart(projections())
        writers: dict[str, Callable[[Path], Any]] = {
            WEIGHTS_NAME: functools.partial(_write, tensors=complete, metadata=metadata),
            CONFIG_NAME: functools.partial(Path.write_text, data=text, encoding="utf-8"),
        }
        replace_files(target, writers, described_by=CONFIG_NAME)


def check_options(safe_serialization: bool, save_function: Callable | None) -> None:
    """Raises ``ValueError`` for what other libraries can be asked for when they save, and this one cannot."""
    if not safe_serialization:
        raise ValueError(
            "safe_serialization must be True: adapters are safetensors files with a checksum, not pickles, which run "
            "any code when they are loaded"
        )
    # Of these libraries all write pickles, on the main process; transformers leaves them out for safetensors as well.
    origin = str(getattr(getattr(save_function, "func", save_function), "__module__", "")).partition(".")[0]
    if save_function is not None and origin not in ("accelerate", "safetensors", "torch", "torch_xla"):
        raise ValueError(
            f"save_function={save_function!r} would not be called: files are written by safetensors and replaced as a "
            "whole. Write into a folder and copy it from there"
        )


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # what the system says is in its text
        if found := re.search(r"os error (\d+)", str(error)):
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


def _contents(
    model: Adapters, name: str, for_peft: bool | None, state_dict: Mapping[str, Tensor] | None
) -> tuple[dict, dict[str, Tensor], Callable[[], dict[str, Tensor]], dict[str, str]]:
    """What the files will hold: the config, the trained tensors, the projections, and the metadata.

    In place of the projections, which are large, there is a function that makes them when they are written.
    """
    config = copy.deepcopy(model.peft_config[name])
    layers = {path: layer for path, layer in adapted_layers(model.model).items() if name in layer.randlora_lambda}
    bases = _same_everywhere(name, config, layers)
    slots = {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}
    dims = required(config, slots)
    for_all = drawn_dims(config, layers)
    given = bases.prng == "none"
    if bases.given is not None:
        pair = (_copy(name, f"randlora_{x}", t, t.dtype) for x, t in zip("AB", bases.given, strict=True))
        bases = RandomBases.from_tensors(*pair)
    with_bases = given or (config.save_projection and for_peft is not False)
    reason = misread(model.model, config, layers, bases, for_all, with_bases)
    if for_peft and reason:
        raise ValueError(f"adapter {name!r} cannot be written for PEFT: {reason}")
    if reason:
        with_bases = given  # only PEFT has a use for others

    tensors = _trained(model, name, config, layers, state_dict)

    def projections() -> dict[str, Tensor]:
        made = _projections(bases, dims if reason else for_all) if with_bases else ()
        return dict(zip(("base_model.randlora_A", "base_model.randlora_B"), made, strict=False))

    free = bases.prng == "philox" and bases.kind in ("sparse", "very_sparse")
    chosen: dict[str, Any] = {
        "inference_mode": True,
        "save_projection": with_bases,
        "sparsity": bases.sparsity if free else None,
        "group_width": bases.group_width,
    }
    if config.exclude_modules is not None or str(config.target_modules).lower() == ALL_LINEAR:
        # PEFT has no exclude_modules, and another idea of all layers for models that are not of transformers.
        chosen |= exact_targets(model.model, layers)
    values = config.to_dict() | chosen
    for key in ("exclude_modules", "peft_version", "sparsity", "group_width"):  # older PEFT does not know the first two
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
        expected = config.num_bases or bases_for_full_rank(min(layer.in_features, layer.out_features), config.r)
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
    model: Adapters,
    name: str,
    config: RandLoraConfig,
    layers: dict[str, RandLoraLayer],
    state_dict: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Copies of what the adapter trains, by their names in the file."""
    live: dict[str, Any] = {}
    sources: dict[str, str] = {}  # the same in the model's state dict
    for slot, layer in layers.items():
        for part in PARAMETERS:
            key = f"{PREFIX}{plain_name(slot)}.{part}"
            live[key], sources[key] = getattr(layer, part)[name], plain_name(f"model.{slot}.{part}.{name}")
    parameters = set(live)
    saved = {path: m for path, m in saved_modules(model.model).items() if name in m.modules_to_save}
    for path, module in saved.items():
        for part, value in module.modules_to_save[name].state_dict(keep_vars=True).items():
            key = plain_name(f"{PREFIX}{path}.{part}")
            live[key], sources[key] = value, plain_name(f"model.{path}.modules_to_save.{name}.{part}")
    adapted = set(map(plain_name, layers))
    for path, bias in biases.trained(model.model, config.bias, layers, saved).items():
        owner = path.rpartition(".")[0]
        # As in a model that has this adapter only.
        key = f"{PREFIX}{owner}.base_layer.bias" if owner in adapted else f"{PREFIX}{path}"
        live[key], sources[key] = bias, f"model.{path}"
    with gathered(live.values() if state_dict is None else ()):
        values = with_numbers(model.model, live) if state_dict is None else _of_state(name, state_dict, live, sources)
        return {
            key: _copy(name, sources[key], value, torch.float32 if key in parameters else None)
            for key, value in values.items()
        }


def _of_state(
    name: str, state_dict: Mapping[str, Tensor], live: Mapping[str, Any], sources: Mapping[str, str]
) -> dict[str, Any]:
    """The tensors of `state_dict` that stand for the `live` ones and have their shapes, or ``ValueError``."""
    given = {_in_state(key): value for key, value in state_dict.items()}
    found = {}
    for key, source in sources.items():
        if source not in given:
            raise ValueError(f"adapter {name!r} cannot be saved: state_dict has no {source}, which this model has")
        value = found[key] = given[source]
        if isinstance(value, Tensor) and value.shape != shape_of(live[key]):
            raise ValueError(
                f"adapter {name!r} cannot be saved: state_dict has {source} of shape {list(value.shape)}, where this "
                f"model's is {list(shape_of(live[key]))}"
            )
    return found


def _in_state(key: str) -> str:
    """A key of a model's state dict without what DistributedDataParallel and torch.compile add; a bias's plain name."""
    key = plain_name(key).removeprefix("module.")
    return biases.plain(key) if is_bias(key) and ".modules_to_save." not in key else key


def _copy(name: str, key: str, value: Any, dtype: torch.dtype | None) -> Tensor:
    """A copy on the CPU of a tensor that can be loaded into one of `dtype` (default: its own), or ``ValueError``."""
    what = f"adapter {name!r} cannot be saved: {key}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} must be a tensor, got {type(value).__name__}")
    if value.is_meta:
        raise ValueError(f"{what} is on the meta device and has no numbers: load or train it first")
    if hasattr(value, "full_tensor"):
        raise ValueError(f"{what} is one part of a tensor that several processes hold: give state_dict, gathered")
    result = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    check_numbers(what, result, dtype or result.dtype)
    return result


def _projections(bases: RandomBases, dims: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The leading part of unit-variance A and B with these dimensions; in float32, or as they were given."""
    max_dim, min_dim, num_bases = dims
    if bases.prng == "philox":
        bases = RandomBases(
            max_dim, min_dim, bases.r, bases.kind, bases.seed, num_bases,
            sparsity=bases.sparsity if bases.kind in ("sparse", "very_sparse") else None, group_width=bases.group_width,
        )  # fmt: skip
    A, B = bases.given or bases.draw(torch.float32, torch.device("cpu"))
    if bases.scale != 1.0:
        A, B = A * math.sqrt(bases.scale), B * math.sqrt(bases.scale)
    return A[:, :, :min_dim], B[:max_dim, :num_bases]


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, each with memory of its own: safetensors writes no partial tensors."""
    result = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        result[key] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    return result
