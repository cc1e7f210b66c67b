"""Ranks that train one model must have the same adapters on the same bases: what differs is found and named.

Bases are made by every rank for itself. With another seed on one of them, its lambda and gamma would mean something
else there, and their gradients would be averaged all the same, without any error.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from ..bases.random_bases import RandomBases
from ..model.parts import adapted_layers
from ..names import plain_name
from .gathering import exchanged, gpu_of

_SHOWN = 3  # differences that a message names
# Paths on this machine, which need not be the same on another.
_LOCAL = ("base_model_name_or_path",)
_MISSING = "missing"
_FAILURE = "description of the adapters"


def check_ranks(model: nn.Module, group: Any = None) -> None:
    """Compare the adapters of `model` between the ranks of `group`; all of them must call this, as any collective.

    Compared are the configs, the adapted layers with their sizes and settings, and the bases: what they are made from,
    or the fingerprint of their values if they were given as tensors. The numbers in lambda and gamma are not compared.
    Ranks exchange a hash each, and the descriptions only if these differ.

    Args:
        model: any module with adapted layers, as it is or wrapped (DistributedDataParallel, FSDP2, torch.compile); a
            PEFT model that :mod:`randlora.integrations.peft` accelerates, too.
        group: a ``torch.distributed`` process group, or a ``DeviceMesh`` for all of its ranks; default: all ranks.

    Without an initialised process group there is one process, and nothing is done.

    Raises:
        ValueError: on every rank, with the ranks, what differs, and the values; also for a model without adapted layers
            and for a group that this rank is not in.
        TypeError: `model` is no ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if distributed.is_available() and distributed.is_initialized() and not compare(model, _groups(group)):
        raise ValueError(f"{type(model).__name__} has no adapted layers on any rank: there is nothing to compare")


def compare(model: nn.Module, groups: Sequence[Any]) -> bool:
    """As :func:`check_ranks`, through process groups that reach all ranks; False if there is nothing to compare."""
    # What fails on one rank only must not keep it from the collective that the others are in.
    failure = None
    try:
        described = describe(model.module if isinstance(model, DistributedDataParallel) else model)
    except Exception as error:
        failure, described = error, {_FAILURE: f"failed with {type(error).__name__}: {error}"}
    gpu = gpu_of(model.parameters())
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    if len(set(exchanged(digest, groups, gpu).values())) > 1:
        raise ValueError(_message(exchanged(described, groups, gpu)))
    if failure is not None:
        raise failure
    return bool(described)


def describe(model: nn.Module) -> dict[str, Any]:
    """What must be equal on all ranks: names for people to read, with values that JSON has."""
    found: dict[str, Any] = {}
    layers = {plain_name(path): layer for path, layer in adapted_layers(model).items()}
    names = sorted({name for layer in layers.values() for name in layer.randlora_lambda})
    if names:
        found["adapters"] = names
    for owner in model.modules():
        configs = vars(owner).get("peft_config")  # of our models and of PEFT's tuners
        if isinstance(configs, Mapping):
            for name in filter(names.__contains__, configs):
                for key, value in asdict(configs[name]).items():
                    if key not in _LOCAL:
                        found[f"{key} of adapter {name!r}"] = _plain(value)
    known: dict[int, str] = {}  # hashing given bases takes a while, and layers share them
    for path, layer in layers.items():
        for name, lam in layer.randlora_lambda.items():
            bases, p = layer.bases[name], getattr(layer.randlora_dropout[name], "p", 0.0)
            if id(bases) not in known:
                known[id(bases)] = _identity(bases)
            where = f"of adapter {name!r} at {path!r}"
            found |= {
                f"features {where}": f"{layer.in_features} -> {layer.out_features}",
                f"bases {where}": known[id(bases)],
                f"r {where}": layer.r[name],
                f"num_bases {where}": layer.num_bases[name],
                f"scaling {where}": layer.scaling[name],
                f"dropout {where}": p,
                f"dtype of lambda {where}": str(lam.dtype),
                f"activity {where}": "active" if name in layer.active_adapters else "not active",
            }
    return found


def _identity(bases: RandomBases) -> str:
    """From what bases are made; their size only where values depend on it, as shared ones grow with other models."""
    if bases.given is not None:
        if any(tensor.is_meta for tensor in bases.given):
            return "given on the meta device"
        return f"given, SHA-256 {bases.fingerprint()[:16]}"
    described = f"kind={bases.kind!r}, seed={bases.seed}, r={bases.r}, prng={bases.prng!r}"
    if bases.prng != "philox":
        return f"{described}, max_dim={bases.max_dim}, min_dim={bases.min_dim}, num_bases={bases.num_bases}"
    if bases.kind == "hadamard":
        return f"{described}, group_width={bases.group_width}"
    return described if bases.sparsity is None else f"{described}, sparsity={bases.sparsity:g}"


def _plain(value: Any) -> Any:
    """`value` as JSON has it. Lists of names are sorted: they are often made from sets, whose order is a process's."""
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(getattr(value, "value", value))
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (set, frozenset, list, tuple)):
        plain = [_plain(inner) for inner in value]
        return sorted(plain) if all(isinstance(inner, str) for inner in plain) else plain
    return type(value).__name__


def _message(described: Mapping[int, Mapping[str, Any]]) -> str:
    """What differs between the ranks."""
    fields = dict.fromkeys((_FAILURE, *(field for values in described.values() for field in values)))
    differences = []
    for field in fields:
        ranks: dict[str, list[int]] = {}
        for rank, values in described.items():
            text = repr(values[field]) if field in values else _MISSING
            ranks.setdefault(text, []).append(rank)
        if len(ranks) > 1:
            differences.append(f"{field} is " + ", ".join(f"{text} on {_named(who)}" for text, who in ranks.items()))
    rest = len(differences) - _SHOWN
    more = f"; and {rest} more differences" if rest > 0 else ""
    return (
        "the ranks do not train the same adapters, so that their gradients do not belong together: "
        f"{'; '.join(differences[:_SHOWN])}{more}. Give every rank the same config, seed and bases"
    )


def _named(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} others" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _groups(group: Any) -> list[Any]:
    """Process groups, one after the other, by which the ranks of `group` hear of all others."""
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.get_coordinate() is None:
            raise ValueError(f"rank {distributed.get_rank()} is not in {group}")
        return list(group.get_all_groups())
    if distributed.get_rank(group) < 0:
        raise ValueError(f"rank {distributed.get_rank()} is not in the process group that is to be compared")
    return [group]
