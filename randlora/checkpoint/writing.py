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
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..bases.definition import bases_for_full_rank
from ..bases.random_bases import RandomBases
from ..config import ALL_LINEAR, RandLoraConfig
from ..distributed.fsdp import hold_parts
from ..distributed.gathering import Processes
from ..distributed.zero3 import is_parameter
from ..layers.randlora_layer import RandLoraLayer
from ..model.adapter_plan import required
from ..model.parts import layers_with
from . import trained
from .card import CARD_NAME, text_for
from .for_peft import drawn_dims, exact_targets, misread
from .layout import (
    CONFIG_NAME,
    FORMAT,
    METADATA_KEY,
    OWN_PEFT_TYPE,
    OWN_SETTINGS,
    WEIGHTS_NAME,
    checksum,
    folder_of,
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
    is_main_process: bool = True,
) -> bool:
    """Write the adapters `names`: ``"default"`` into `folder`, others into ``folder/<name>``, and a model card.

    With ``save_projection=False`` a file holds the trained numbers and nothing else. Bases that came from a file, and
    so cannot be made again, are always written. The same adapter always gives the same bytes. All numbers are copied
    first: what is written is what was checked, whatever other threads do to the model meanwhile.

    Where several processes hold parts of what is saved (FSDP2, tensor parallel: ``DTensor``), they and all others that
    hold parts of the model must call this; the first one whose `is_main_process` is True writes, and what is raised on
    one is raised on all. So it is with ZeRO-3, where all call this without `is_main_process`, or one with a
    `state_dict`. Otherwise no process waits for another.

    Args:
        for_peft: True: raise ``ValueError``, with nothing written, where PEFT could not compute the same. None: write
            it so that PEFT refuses to load it. False: write no projections, whatever the config says.
        state_dict: the model's, to take the numbers from, as it is gathered from processes that hold a part each.
        is_main_process: False: this process writes nothing.

    Returns:
        Whether this process has written them.

    Raises:
        ValueError: see above; an adapter whose layers differ in what its one config says; NaN, infinity and whatever
            else could not be loaded again, by name. Nothing is written then.
        OSError: the folder cannot be written, or the disk is full; the old files are as they were then.
    """
    hold_parts(model.modules())
    layers = {name: layers_with(model.model, name) for name in names}
    found = {name: trained.sources(model.model, name, model.peft_config[name], layers[name]) for name in names}
    state = None if state_dict is None else trained.plain_state(state_dict)
    processes = Processes.that_hold(
        tensor
        for sources in found.values()
        for tensor in (
            [source.live for source in sources.values()] if state is None else trained.in_state(state, sources).values()
        )
        # DeepSpeed gathers a state_dict on the main process alone, and the others have none to give.
        if is_main_process or not is_parameter(tensor)
    )
    if not (is_main_process or processes):
        return False
    if processes:  # those that hold other parts of the model only, along another dimension of the mesh, come, too
        processes = processes.joined_by(model.parameters())
    with processes.agreeing():
        prepared = {name: _description(model, name, layers[name], for_peft) for name in names}
        values = {name: trained.values(model.model, name, found[name], state) for name in names}
    writes = processes.chosen(is_main_process)
    copied = {name: trained.copies(values[name], kept=writes) for name in names}
    with processes.agreeing():
        if writes:
            _write_all(model, Path(folder), prepared, copied, found)
    return writes


def _write_all(
    model: Adapters,
    folder: Path,
    prepared: Mapping[str, _Description],
    copied: Mapping[str, dict[str, Tensor]],
    found: Mapping[str, Mapping[str, trained.Source]],
) -> None:
    for name, tensors in copied.items():
        trained.check(name, tensors, found[name])
    text = text_for(model, folder, {name: description.config["peft_type"] for name, description in prepared.items()})
    for_card = {} if text is None else {CARD_NAME: functools.partial(Path.write_text, data=text, encoding="utf-8")}
    for name, (config, description, projections) in prepared.items():
        description["sha256"] = checksum(description, copied[name])
        metadata = {METADATA_KEY: json.dumps(description, sort_keys=True)}
        settings = json.dumps(config, indent=2, sort_keys=True) + "\n"
        complete = copied[name] | _apart(projections())
        writers: dict[str, Callable[[Path], Any]] = {
            WEIGHTS_NAME: functools.partial(write_tensors, tensors=complete, metadata=metadata),
            CONFIG_NAME: functools.partial(Path.write_text, data=settings, encoding="utf-8"),
        }
        if folder_of(folder, name) == folder:
            writers, for_card = writers | for_card, {}
        replace_files(folder_of(folder, name), writers, described_by=CONFIG_NAME)
    if for_card:
        replace_files(folder, for_card)


def check_options(
    safe_serialization: bool,
    save_function: Callable | None = None,
    save_embedding_layers: bool | str = "auto",
    others: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Raises for what other libraries can be asked for when they save, and this one cannot.

    Args:
        others: what must be None, as there is nothing of the kind here.

    Raises:
        ValueError: with the reason, and what to do.
    """
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
    if save_embedding_layers not in ("auto", False):
        raise ValueError(
            f"save_embedding_layers={save_embedding_layers!r}: what is saved is what was trained. Name the embeddings "
            "in modules_to_save when the model is adapted"
        )
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"{name} must be None, got {value!r}: {_NOT_HERE[name]}")


_NOT_HERE = {
    "path_initial_model_for_weight_conversion": "RandLoRA's initialisation changes no weight of the base model",
    "variant": "an adapter's files have one name each; save it into another folder",
}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """safetensors' ``save_file``, whose errors of the system are ``OSError`` here."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # what the system says is in its text
        if found := re.search(r"os error (\d+)", str(error)):
            number = int(found.group(1))
            raise OSError(number, os.strerror(number), str(path)) from error
        raise


class _Description(NamedTuple):
    """What the files will hold beside what is trained.

    In place of the projections, which are large, there is a function that makes them when they are written.
    """

    config: dict[str, Any]
    metadata: dict[str, Any]  # without the checksum
    projections: Callable[[], dict[str, Tensor]]


def _description(model: Adapters, name: str, layers: dict[str, RandLoraLayer], for_peft: bool | None) -> _Description:
    config = copy.deepcopy(model.peft_config[name])
    bases = _same_everywhere(name, config, layers)
    slots = {path: (layer.in_features, layer.out_features) for path, layer in layers.items()}
    dims = required(config, slots)
    for_all = drawn_dims(config, layers)
    given = bases.prng == "none"
    if bases.given is not None:
        pair = {f"randlora_{x}": t for x, t in zip("AB", bases.given, strict=True)}
        sources = {key: trained.Source(tensor, key) for key, tensor in pair.items()}
        pair = trained.copies(trained.values(model.model, name, sources, None))
        trained.check(name, pair, sources)
        bases = RandomBases.from_tensors(*pair.values())
    with_bases = given or (config.save_projection and for_peft is not False)
    reason = misread(model.model, config, layers, bases, for_all, with_bases)
    if for_peft and reason:
        raise ValueError(f"adapter {name!r} cannot be written for PEFT: {reason}")
    if reason:
        with_bases = given  # only PEFT has a use for others

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
    narrowed = config.exclude_modules is not None or str(config.target_modules).lower() == ALL_LINEAR
    if narrowed and not config.target_parameters:
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
    return _Description(values, description, projections)


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
            ("scaling", layer.scaling[name], config.scaling),
            ("num_bases", layer.num_bases[name], expected),
        ):
            if here != said:
                raise ValueError(
                    f"adapter {name!r} cannot be saved as one: at {path!r} its {what} is {here}, not the {said} of its "
                    "config"
                )
    return bases


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
