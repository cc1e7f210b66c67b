"""What LoRA of PEFT would take on the same layers, for :func:`randlora.estimate` to compare with."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ..checkpoint.layout import PREFIX
from ..model.adapter_plan import Plan
from .methods import bytes_of, file_bytes_of, numbers_in, rows_of
from .step import Beside, Shapes, Step


def lora(step: Step, plan: Plan, others: Beside, rank: int | None = None) -> dict[str, Any]:
    """As PEFT computes it: in the dtype of A and B, or in autocast's, with dropout of the same probability.

    For experts PEFT adds the update to the weights of all of them, in a copy that is kept for backward.

    `rank`: default: the one whose number of parameters is nearest to the plan's.
    """
    r, layers = plan.config.r, [(layer, layer.experts or 1) for layer in step.layers]
    own = sum(times * x.num_bases * (r + min(x.in_features, x.out_features)) for x, times in layers)
    rank = rank or max(1, round(own / sum(times * (x.in_features + x.out_features) for x, times in layers)))
    trained: Shapes = {}
    for layer, times in layers:
        trained[f"{PREFIX}{layer.name}.lora_A.weight"] = layer.parameter_dtype, (times * rank, layer.in_features)
        trained[f"{PREFIX}{layer.name}.lora_B.weight"] = layer.parameter_dtype, (layer.out_features, times * rank)

    T, dropout = step.tokens, plan.config.randlora_dropout > 0
    saved = workspace = forward = backward = 0
    shared: dict[int, int] = {}
    shapes: Counter[tuple] = Counter()
    for layer, call in step.calls():
        wide, high = layer.in_features, layer.out_features
        shapes[wide, high, call.need_x] += 1
        if layer.experts:
            copied = layer.experts * wide * high
            saved += copied * layer.dtype.itemsize
            workspace = max(workspace, copied * layer.dtype.itemsize)  # the gradient of that copy
            forward += copied * rank
            backward += 2 * copied * rank + step.rows(layer) * wide * high
            continue
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
    file_bytes = file_bytes_of(trained | others.written, "")
    return {
        "rank": rank,
        "trainable_parameters": numbers_in(trained | others.trained),
        "bases_form": None,
        "bases_bytes": 0,
        "saved_bytes": saved + sum(shared.values()),
        "workspace_bytes": workspace,
        "multiply_adds": forward + backward,
        "forward_multiply_adds": forward,
        "optimizer_bytes": 2 * bytes_of(trained | others.trained),
        "file_bytes": file_bytes,
        "file_bytes_without_projections": file_bytes,
        "shapes": rows_of("in_features out_features input_gradient", shapes),
    }
