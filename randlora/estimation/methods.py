"""The counting behind :func:`randlora.estimate`: RandLoRA of one kind on the layers of a plan, and sums."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from .. import planner
from ..bases import patterns
from ..bases.definition import bases_for_full_rank
from ..bases.random_bases import RandomBases
from ..checkpoint.layout import PARAMETERS, PREFIX
from ..config import RandLoraConfig
from ..costs.lists import Lists
from ..costs.strategies import Cost, LayerCall
from ..layers import experts_choice
from ..model.adapter_plan import Plan, own_bases, required
from .step import Beside, Layer, Shapes, Step


def randlora(step: Step, plan: Plan, kind: str, others: Beside, projections: bool) -> dict[str, Any]:
    same = kind == plan.config.kind
    sparsity, width = (plan.config.sparsity, plan.config.group_width) if same else (None, None)
    config = replace(plan.config, kind=kind, sparse=False, very_sparse=False, sparsity=sparsity, group_width=width)
    max_dim, min_dim, num_bases = need = required(config, plan.slots)
    config, bases = own_bases(config, plan.slots, plan.peft_dims)
    if bases.prng != "philox":
        max_dim, min_dim, num_bases = need = bases.max_dim, bases.min_dim, bases.num_bases

    trained: Shapes = {}
    for layer in step.layers:
        for part, shape in zip(PARAMETERS, plan.shapes(layer.name), strict=True):
            trained[f"{PREFIX}{layer.name}.{part}"] = layer.parameter_dtype, shape

    workspace = forward = backward = 0
    shapes: Counter[tuple] = Counter()
    dense: set[torch.dtype] = set()
    for layer, call in step.calls():
        sizes = layer.in_features, layer.out_features
        form = planner.form(expected_pattern(bases, need, min(sizes), step))
        if form is None:
            dense.add(layer.dtype)
        if grouped := _grouped(step, layer, config, form, call.need_x):
            rows, first, second, temporaries = grouped
            frozen = rows * sizes[0] * sizes[1]
            forward += first.multiply_adds - frozen
            backward += second.multiply_adds - frozen * call.need_x
            workspace = max(workspace, temporaries)
            row = *sizes, layer.num_bases, call.need_x, "grouped", "grouped"
            shapes[row] += layer.experts
            continue
        for tokens, count in step.products(layer):
            chosen, costs = _strategies(step, layer, tokens, config, form, call.need_x)
            frozen = 0 if layer.weight_dtype is None else tokens * sizes[0] * sizes[1]
            forward += count * (costs[0].multiply_adds - frozen)
            backward += count * (costs[1].multiply_adds - frozen * call.need_x)
            workspace = max(workspace, *(cost.workspace for cost in costs))
            row = *sizes, layer.num_bases, call.need_x, *chosen
            shapes[row] += count

    pattern = expected_pattern(bases, need, min_dim, step)
    elements = config.r * (min_dim + max_dim * num_bases)
    written = trained | others.written
    in_file: Shapes = {}
    if projections:
        M, m = plan.peft_dims
        in_file["base_model.randlora_A"] = torch.float32, (config.r, 1, m)
        in_file["base_model.randlora_B"] = torch.float32, (M, bases_for_full_rank(m, config.r), config.r)
    said = json.dumps(asdict(config))
    return {
        "trainable_parameters": numbers_in(trained | others.trained),
        "bases_form": _form(bases, step),
        "bases_bytes": sum(t.nbytes for t in pattern or ()) + sum(elements * dtype.itemsize for dtype in dense),
        "saved_bytes": sum(inputs_kept(step).values()),
        "workspace_bytes": workspace,
        "multiply_adds": forward + backward,
        "forward_multiply_adds": forward,
        "optimizer_bytes": 2 * bytes_of(trained | others.trained),
        "file_bytes": file_bytes_of(written | in_file, said),
        "file_bytes_without_projections": file_bytes_of(written, said),
        "shapes": rows_of("in_features out_features num_bases input_gradient forward backward", shapes),
    }


def _strategies(
    step: Step, layer: Layer, tokens: int, config: RandLoraConfig, form: Lists | str | None, need_x: bool
) -> tuple[tuple[str, str], tuple[Cost, Cost]]:
    """The strategies of both passes for so many tokens, and their costs: decided as ``Linear`` does."""
    shape = tokens, layer.in_features, layer.out_features, layer.num_bases, config.r
    strategy = config.strategy if layer.weight_dtype is not None else planner.without_weight(config.strategy)
    needs: dict[str, Any] = {"dropout": int(config.randlora_dropout > 0), "need_x": int(need_x), "need_parameters": 1}
    chosen = strategy, strategy
    if strategy == "auto":
        chosen = planner.choose(*shape, layer.dtype, layer.weight_dtype, step.device.type, form=form, **needs)
    has_weight = int(layer.weight_dtype is not None)
    call = LayerCall(*shape, layer.dtype.itemsize, step.device.type, has_weight=has_weight, **needs)
    options = planner.costs_of(call, form)
    return chosen, (options[chosen[0]][0], options[chosen[1]][1])


def _grouped(
    step: Step, layer: Layer, config: RandLoraConfig, form: Lists | str | None, need_x: bool
) -> tuple[int, Cost, Cost, int] | None:
    """Of all experts at once: rows, costs of both passes, bytes of temporaries. None where they are called in turn."""
    if not layer.experts or config.strategy != "auto" or config.randlora_dropout or layer.dtype != layer.weight_dtype:
        return None
    sizes = experts_choice.Sizes(layer.in_features, layer.out_features, layer.num_bases, config.r, layer.dtype)
    counts = [tokens for tokens, count in step.products(layer) for _ in range(count)]
    counts += [0] * (layer.experts - len(counts))
    if not experts_choice.is_taken(counts, sizes, step.device.type, form, need_x, True):
        return None
    call = LayerCall(sum(counts), *sizes[:4], layer.dtype.itemsize, step.device.type, need_x=int(need_x))
    forward, backward = planner.costs_of(call, None)["factored"]
    return sum(counts), forward, backward, experts_choice.temporaries(counts, sizes, form)


def expected_pattern(
    bases: RandomBases, need: tuple[int, int, int], min_dim: int, step: Step
) -> tuple[Tensor, ...] | None:
    """What ``bases.pattern(min_dim, device)`` would give, grown to `need`: meta tensors, of expected sizes."""
    z, form = bases.sparsity, _form_of(bases, step)
    if form is None:
        return None
    (M, m, n), r, width = need, bases.r, bases.group_width or 0
    z = z or 1.0  # Hadamard bases have none

    def empty(*shape: float, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty([round(size) for size in shape], dtype=dtype, device="meta")

    if form is patterns.StoredSeed:
        return (empty(0, 0, 0),)
    if form is patterns.StoredSigns:
        return *(empty(-(-count // 32)) for count in (m, M, n * r)), empty(width, 0, dtype=torch.int8)
    if form is not patterns.StoredLists:
        planes = patterns.planes_of(z) if form is patterns.StoredBits else 2
        b_planes = empty(n * r, planes, -(-M // 16), dtype=torch.int16)
        if form is patterns.StoredBits:
            return empty(r, planes, -(-m // 16), dtype=torch.int16), b_planes
        return empty(r + 1), empty(r * m / z), b_planes
    columns = round(min_dim * (1 - (1 - 1 / z) ** r))
    index = torch.int16 if M <= 1 << 16 else torch.int32
    return (
        empty(columns), empty(columns + 1), empty(r * m / z), empty(2 * n * r + 1), empty(M * n * r / z, dtype=index)
    )  # fmt: skip


def _form_of(bases: RandomBases, step: Step) -> type[patterns.Form] | None:
    keep = step.keep_bases or bases.why_kept() is not None
    return patterns.form_for(bases.kind, bases.sparsity, step.device, keep)


def _form(bases: RandomBases, step: Step) -> str:
    form = _form_of(bases, step)
    return "dense" if form is None else form.name


# ---- sums ----


def inputs_kept(step: Step) -> dict[int, int]:
    """Bytes of the inputs that only the adapted layers keep, one for all that share it."""
    return {
        call.input: step.rows(layer) * layer.in_features * layer.input_dtype.itemsize
        for layer, call in step.calls()
        if not call.kept
    }


def rows_of(names: str, counts: Counter[tuple]) -> list[dict[str, Any]]:
    return [dict(zip(names.split(), key, strict=True)) | {"count": count} for key, count in counts.items()]


def numbers_in(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for _, shape in shapes.values())


def bytes_of(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes.values())


def file_bytes_of(shapes: Shapes, said: str) -> int:
    """Of the weights with their header, in which a name, dtype, shape and place stand per tensor, and of the config.

    The config is in both files: in the header with quotes that are escaped, and beside it indented.
    """
    names = sum(len(f'"{name}":{{"dtype":"F32","shape":{list(shape)},"data_offsets":[12345678,12345678]}},')
                for name, (_, shape) in shapes.items())  # fmt: skip
    return bytes_of(shapes) + names + len(said) * 2 + 400
