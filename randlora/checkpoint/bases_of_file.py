"""The bases of an adapter that is read: made again and proven to be the same, or the ones that its file holds.

PEFT calls the latter its projections.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..bases.definition import bases_for_full_rank
from ..bases.random_bases import RandomBases
from ..bases.shared import shared
from ..model.adapter_plan import Plan
from ..model.targets import is_supported, layer_sizes
from .layout import as_bytes, is_projection
from .weights import Place, Weights


def check_sizes(path: Path, model: nn.Module, plan: Plan, shapes: Mapping[str, Place]) -> None:
    """PEFT sizes projections by the layers of the model's first adapter: none of this model's can need larger ones."""
    layers = [layer_sizes(module) for module in model.modules() if is_supported(module)]
    r, largest = plan.config.r, max(map(max, [*layers, *plan.slots.values()]))
    num_bases = max(plan.config.num_bases or 0, bases_for_full_rank(largest, r))
    for name, (key, shape, _) in shapes.items():
        limit = r * largest if name.endswith("A") else r * largest * num_bases
        if is_projection(name) and math.prod(shape) > limit:
            raise ValueError(
                f"{path}: {key} {list(shape)} is too large: bases for this model, whose layers have at most {largest} "
                f"features, have at most {limit} numbers there"
            )


def on_bases_of(file: Weights, plan: Plan) -> Plan:
    """`plan` on the bases that the adapter in `file` was trained with, made again or taken from its projections.

    Raises:
        ValueError: the bases made here have another fingerprint, or projections are missing or do not fit.
    """
    need = plan.required()
    if file.described is None:
        projections = file.projections()
        if projections is not None:
            return plan.on(_given(file.path, plan, projections))
        warnings.warn(
            f"{file.path} holds no projections, and nothing by which the bases made here could be checked: they are "
            'drawn as PEFT draws them on machines with bfloat16 ("prng": "peft-fp16" in its config: on those without), '
            "with this PyTorch; dense ones differ between PyTorch up to 2.11 and later ones",
            stacklevel=4,
        )
        return plan.on_own_bases()
    expected = file.described["fingerprint"]
    if tuple(file.described["dims"]) != need:
        raise ValueError(
            f"{file.path}: its bases are for layers up to (max_dim, min_dim, num_bases) = "
            f"{tuple(file.described['dims'])}, not {need}: it is of another model"
        )
    if file.described["prng"] != "none":
        plan = plan.on_own_bases()
        if (made := plan.bases.fingerprint(*need)) == expected:
            return plan
    if file.described["prng"] != "philox" and (projections := file.projections()) is not None:
        bases = _given(file.path, plan, projections)
        # A fingerprint covers how bases are made, which nobody knows of given ones.
        if file.described["prng"] != "none" or (made := bases.fingerprint(*need)) == expected:
            return plan.on(bases)
    elif file.described["prng"] == "none":
        raise ValueError(f"{file.path} lacks its projections, which cannot be made again")
    drawn = file.described["prng"] != "philox" and plan.config.kind == "dense"
    raise ValueError(
        f"{file.path}: the random bases made here are not those that it was trained with (fingerprint {made[:16]}..., "
        f"expected {expected[:16]}...)"
        + (": PEFT's dense ones differ between PyTorch up to 2.11 and later ones" if drawn else "")
    )


def _given(path: Path, plan: Plan, projections: tuple[Tensor, Tensor]) -> RandomBases:
    """Bases of these values, the same object for equal ones, with memory apart from the file."""
    digest = hashlib.sha256()
    for tensor in projections:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(as_bytes(tensor))
    try:
        bases = shared(
            ("given", digest.digest()), lambda: RandomBases.from_tensors(*(tensor.clone() for tensor in projections))
        )
        if bases.r != plan.config.r:
            raise ValueError(f"the config says r = {plan.config.r}, but these bases have r = {bases.r}")
        bases.require(*plan.required())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its projections do not fit: {error}") from error
    return bases
