"""The counting behind :func:`randlora.estimate`: RandLoRA of one kind, and LoRA, on the layers of a plan."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .. import planner
from ..bases import patterns
from ..bases.definition import bases_for_full_rank
from ..bases.random_bases import RandomBases
from ..checkpoint import biases
from ..checkpoint.layout import PARAMETERS, PREFIX
from ..config import RandLoraConfig
from ..costs.lists import Lists
from ..costs.strategies import Cost, LayerCall
from ..distributed.zero3 import shape_of
from ..dtypes import at_least_fp32
from ..layers.linears import dtype_and_device
from ..layers.ordinary import is_plain
from ..layers.randlora_layer import RandLoraLayer
from ..model.adapter_plan import Plan, own_bases, required
from .trial_call import Call

Shapes = dict[str, tuple[torch.dtype, Sequence[int]]]  # of named tensors


@dataclass(frozen=True)
class Layer:
    """A linear layer that gets parameters. Its product is in `dtype`, its input comes in `input_dtype`.

    `weight_dtype` None: the base layer computes its product itself. `calls` None: nobody has seen it called.
    """

    name: str
    in_features: int
    out_features: int
    num_bases: int
    parameter_dtype: torch.dtype
    dtype: torch.dtype
    input_dtype: torch.dtype
    weight_dtype: torch.dtype | None
    calls: list[Call] | None = None


@dataclass(frozen=True)
class Step:
    """A training step: `tokens` tokens through `layers` on `device`, with dense bases that are kept, or made anew."""

    tokens: int
    device: torch.device
    layers: list[Layer]
    keep_bases: bool = True

    def calls(self) -> Iterator[tuple[Layer, Call]]:
        """A call that nobody has seen gets an input of its own, which needs a gradient."""
        for i, layer in enumerate(self.layers):
            for call in layer.calls or [Call(-1 - i, False, True)]:
                yield layer, call


@dataclass(frozen=True)
class Beside:
    """What an adapter trains, and what its file holds, beside the parameters of layers: biases, whole modules."""

    trained: Shapes
    written: Shapes


def layers_of(model: nn.Module, plan: Plan, autocast: torch.dtype | None) -> list[Layer]:
    modules = dict(model.named_modules(remove_duplicate=False))
    usual = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    found = []
    for name, sizes in plan.slots.items():
        parent = modules[name.rpartition(".")[0]]
        attention = isinstance(parent, nn.MultiheadAttention)  # it is taken apart into plain layers
        module = parent.out_proj if attention else modules[name]
        plain = attention or is_plain(module)
        told, _ = dtype_and_device(module.get_base_layer() if isinstance(module, RandLoraLayer) else module)
        own = usual if told is None else told
        dtype = own if autocast is None or own == torch.float64 else autocast
        parameters = at_least_fp32(torch.float32 if told is None else told)
        found.append(Layer(name, *sizes, plan.num_bases(name), parameters, dtype, own, own if plain else None))
    return found


def beside(model: nn.Module, plan: Plan) -> Beside:
    trained: Shapes = {
        f"{PREFIX}{name}": (bias.dtype, shape_of(bias))
        for name, bias in biases.trained(model, plan.config.bias, plan.slots, plan.saved).items()
    }
    written = dict(trained)
    for name in plan.saved:
        module = model.get_submodule(name)
        for key, value in module.named_parameters():
            if value.is_floating_point():
                trained[f"{PREFIX}{name}.{key}"] = value.dtype, shape_of(value)
        for key, value in module.state_dict(keep_vars=True).items():
            written[f"{PREFIX}{name}.{key}"] = value.dtype, shape_of(value)
    return Beside(trained, written)


def writes_projections(model: nn.Module, plan: Plan) -> bool:
    """Whether the file gets the bases: if the config says so, and PEFT can use the adapter (checkpoint.for_peft)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses = Counter(map(id, modules.values()))
    for name, sizes in plan.slots.items():
        attention = isinstance(modules[name.rpartition(".")[0]], nn.MultiheadAttention)
        if (
            attention
            or uses[id(modules[name])] > 1
            or plan.num_bases(name) != bases_for_full_rank(min(sizes), plan.config.r)
        ):
            return False
    return plan.config.save_projection


# ---- RandLoRA ----


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
        n, m = layer.num_bases, min(layer.in_features, layer.out_features)
        for part, shape in zip(PARAMETERS, ((config.r, n), (n, m)), strict=True):
            trained[f"{PREFIX}{layer.name}.{part}"] = layer.parameter_dtype, shape

    workspace = forward = backward = 0
    shapes: Counter[tuple] = Counter()
    dense: set[torch.dtype] = set()
    for layer, call in step.calls():
        sizes = layer.in_features, layer.out_features
        form = planner.form(expected_pattern(bases, need, min(sizes), step))
        chosen, costs, takes_dense = _strategies(step, layer, config, form, call.need_x)
        if takes_dense:
            dense.add(layer.dtype)
        frozen = 0 if layer.weight_dtype is None else step.tokens * sizes[0] * sizes[1]
        forward += costs[0].multiply_adds - frozen
        backward += costs[1].multiply_adds - frozen * call.need_x
        workspace = max(workspace, *(cost.workspace for cost in costs))
        row = *sizes, layer.num_bases, call.need_x, *chosen
        shapes[row] += 1

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
        "trainable_parameters": _numbers(trained | others.trained),
        "bases_form": _form(bases, step),
        "bases_bytes": sum(t.nbytes for t in pattern or ()) + sum(elements * dtype.itemsize for dtype in dense),
        "saved_bytes": sum(_inputs(step).values()),
        "workspace_bytes": workspace,
        "multiply_adds": forward + backward,
        "forward_multiply_adds": forward,
        "optimizer_bytes": 2 * _bytes(trained | others.trained),
        "file_bytes": _file_bytes(written | in_file, said),
        "file_bytes_without_projections": _file_bytes(written, said),
        "shapes": _rows("in_features out_features num_bases input_gradient forward backward", shapes),
    }


def _strategies(
    step: Step, layer: Layer, config: RandLoraConfig, form: Lists | str | None, need_x: bool
) -> tuple[tuple[str, str], tuple[Cost, Cost], bool]:
    """The strategies of both passes, their costs, and whether they take dense bases: decided as ``Linear`` does."""
    shape = step.tokens, layer.in_features, layer.out_features, layer.num_bases, config.r
    strategy = config.strategy if layer.weight_dtype is not None else planner.without_weight(config.strategy)
    needs: dict[str, Any] = {"dropout": int(config.randlora_dropout > 0), "need_x": int(need_x), "need_parameters": 1}
    chosen = strategy, strategy
    if strategy == "auto":
        chosen = planner.choose(*shape, layer.dtype, layer.weight_dtype, step.device.type, form=form, **needs)
    has_weight = int(layer.weight_dtype is not None)
    call = LayerCall(*shape, layer.dtype.itemsize, step.device.type, has_weight=has_weight, **needs)
    options = planner.costs_of(call, form)
    return chosen, (options[chosen[0]][0], options[chosen[1]][1]), form is None


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


# ---- LoRA ----


def lora(step: Step, plan: Plan, others: Beside) -> dict[str, Any]:
    """As PEFT computes it: in the dtype of A and B, or in autocast's, with dropout of the same probability."""
    own = sum(layer.num_bases * (plan.config.r + min(layer.in_features, layer.out_features)) for layer in step.layers)
    rank = max(1, round(own / sum(layer.in_features + layer.out_features for layer in step.layers)))
    trained: Shapes = {}
    for layer in step.layers:
        trained[f"{PREFIX}{layer.name}.lora_A.weight"] = layer.parameter_dtype, (rank, layer.in_features)
        trained[f"{PREFIX}{layer.name}.lora_B.weight"] = layer.parameter_dtype, (layer.out_features, rank)

    T, dropout = step.tokens, plan.config.randlora_dropout > 0
    saved = workspace = forward = backward = 0
    shared: dict[int, int] = {}
    shapes: Counter[tuple] = Counter()
    for layer, call in step.calls():
        wide, high = layer.in_features, layer.out_features
        product = layer.parameter_dtype if layer.dtype == layer.input_dtype else layer.dtype
        if dropout:  # what is left of the input, and for its gradient the mask: on CUDA a byte, elsewhere a factor
            mask = 1 if step.device.type == "cuda" else layer.parameter_dtype.itemsize
            saved += T * wide * (product.itemsize + call.need_x * mask)
        elif product != layer.input_dtype:
            saved += T * wide * product.itemsize  # every layer casts for itself
        elif not call.kept:
            shared[call.input] = T * wide * product.itemsize
        saved += T * rank * product.itemsize
        forward += T * rank * (wide + high)
        backward += T * rank * (2 * (wide + high) - (0 if call.need_x else wide))
        workspace = max(workspace, T * (high + max(wide, high)) * product.itemsize)
        shapes[wide, high, call.need_x] += 1
    file_bytes = _file_bytes(trained | others.written, "")
    return {
        "rank": rank,
        "trainable_parameters": _numbers(trained | others.trained),
        "bases_form": None,
        "bases_bytes": 0,
        "saved_bytes": saved + sum(shared.values()),
        "workspace_bytes": workspace,
        "multiply_adds": forward + backward,
        "forward_multiply_adds": forward,
        "optimizer_bytes": 2 * _bytes(trained | others.trained),
        "file_bytes": file_bytes,
        "file_bytes_without_projections": file_bytes,
        "shapes": _rows("in_features out_features input_gradient", shapes),
    }


# ---- sums ----


def _inputs(step: Step) -> dict[int, int]:
    """Bytes of the inputs that only the adapted layers keep, one for all that share it."""
    return {
        call.input: step.tokens * layer.in_features * layer.input_dtype.itemsize
        for layer, call in step.calls()
        if not call.kept
    }


def _rows(names: str, counts: Counter[tuple]) -> list[dict[str, Any]]:
    return [dict(zip(names.split(), key, strict=True)) | {"count": count} for key, count in counts.items()]


def _numbers(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() for _, shape in shapes.values())


def _bytes(shapes: Shapes) -> int:
    return sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in shapes.values())


def _file_bytes(shapes: Shapes, said: str) -> int:
    """Of the weights with their header, in which a name, dtype, shape and place stand per tensor, and of the config.

    The config is in both files: in the header with quotes that are escaped, and beside it indented.
    """
    names = sum(len(f'"{name}":{{"dtype":"F32","shape":{list(shape)},"data_offsets":[12345678,12345678]}},')
                for name, (_, shape) in shapes.items())  # fmt: skip
    return _bytes(shapes) + names + len(said) * 2 + 400
