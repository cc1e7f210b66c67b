"""An estimate as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..tables import aligned

MIB, MILLION, GIGA = 1 << 20, 10**6, 10**9
ROWS = (
    ("trained parameters", "M", "trainable_parameters", MILLION),
    ("bases", "MiB", "bases_bytes", MIB),
    ("saved activations", "MiB", "saved_bytes", MIB),
    ("workspace", "MiB", "workspace_bytes", MIB),
    ("AdamW's moments", "MiB", "optimizer_bytes", MIB),
    ("operations per step", "G multiply-adds", "multiply_adds", GIGA),
    ("adapter file", "MiB", "file_bytes", MIB),
    ("  without bases", "MiB", "file_bytes_without_projections", MIB),
)


def table(result: Mapping[str, Any]) -> str:
    methods: Mapping[str, Mapping[str, Any]] = result["methods"]
    title = (
        f"{result['layers']} layers of a model with {result['model_parameters'] / MILLION:,.1f} M parameters; "
        f"{result['tokens']} tokens per step, {result['dtype']} on {result['device']}"
    )
    names = [f"LoRA, rank {values['rank']}" if "rank" in values else name for name, values in methods.items()]
    rows = [["beyond the frozen model", "unit", *names]]
    for label, unit, key, size in ROWS:
        rows.append([label, unit, *(_number(values[key] / size) for values in methods.values())])
    forms = [values["bases_form"] or "-" for values in methods.values()]
    rows.insert(3, ["  kept as", "", *forms])
    parts = [title, "", *aligned(rows, left=2), ""]

    shapes = [["layers", "calls", "bases", "kind", "forward", "backward"]]
    before: tuple[str, ...] = ()
    for kind, row in _by_shape(methods):
        gradient = "" if row["input_gradient"] else ", no input gradient"
        named = (
            f"{row['in_features']} -> {row['out_features']}{gradient}", f"{row['count']}", f"{row['num_bases']}"
        )  # fmt: skip
        shapes.append([*(named if named != before else ("", "", "")), kind, row["forward"], row["backward"]])
        before = named
    parts += aligned(shapes, left=1, words=3)
    parts += ["", *(f"- {note}" for note in result["notes"])]
    return "\n".join(parts)


def _by_shape(methods: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Kind and row of every shape, all kinds of one shape together."""
    found: dict[tuple, list] = {}
    for kind, values in methods.items():
        for row in values["shapes"]:
            if "forward" in row:
                key = row["in_features"], row["out_features"], row["num_bases"], row["input_gradient"]
                found.setdefault(key, []).append((kind, row))
    return [pair for pairs in found.values() for pair in pairs]


def _number(value: float) -> str:
    """Three digits that count, and no more than that after the point."""
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 or value == 0 else 3}f}"
