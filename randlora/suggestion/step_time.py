"""How long a training step takes with an adapter, relative to one of the frozen model.

What an adapter adds to a step are its operations, as :func:`randlora.estimate` counts them, and passes over the inputs
and outputs of the layers that it is on: casts, sums, whatever no product hides. A byte of these weighs as much as for
the planner (:data:`randlora.planner.BALANCE`). The frozen model's step is the products of its linear layers, and passes
over their inputs and outputs, too, in place of attention, norms and all else. How many passes was fitted to measured
steps of MiniLM, ViT-B, RoBERTa and Llama-3.2-3B with r = 32 (bench/results, model.csv), which tests compare with. Where
a GPU gets few tokens its host decides: all adapters cost about the same then, and more than is said here.
"""

from __future__ import annotations

from torch import nn

from ..estimation.count import Counted
from ..estimation.step import top_k_of
from ..layers.experts_form import is_fused_experts, weight_names
from ..layers.experts_form import sizes as sizes_of_expert
from ..layers.linears import is_linear, sizes_of
from ..planner import BALANCE

FROZEN, LORA = "frozen", "lora"
PASSES = {
    "cpu": {FROZEN: 9.0, LORA: 7.0, "dense": 4.0, "hadamard": 1.5, "very_sparse": 4.0},
    "cuda": {FROZEN: 18.0, LORA: 6.0, "dense": 5.0, "hadamard": 11.0, "very_sparse": 3.0},
}


def relative_step(model: nn.Module, counted: Counted, method: str, multiply_adds: int) -> float:
    """Of `model` with an adapter that takes so many `multiply_adds`, over one of the frozen model."""
    step = counted.step
    passes = PASSES.get(step.device.type, PASSES["cuda"])
    per_element = BALANCE.get((step.device.type, step.dtype.itemsize), 10) * step.dtype.itemsize
    moved = sum(step.rows(layer) * (layer.in_features + layer.out_features) for layer, _ in step.calls())
    own = multiply_adds + per_element * passes.get(method, passes["dense"]) * moved
    frozen = 0.0
    for name, (rows, wide, high) in products_of(model).items():
        times = step.tokens * rows * len(counted.calls.get(name) or "1")  # some models call a layer more than once
        frozen += times * (2 * wide * high + per_element * passes[FROZEN] * (wide + high))
    return 1.0 + own / frozen


def products_of(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Of every product with weights: how often a token goes through it, and its (in, out)."""
    found: dict[str, tuple[int, int, int]] = {}
    for name, module in model.named_modules():
        if is_fused_experts(module):
            for weight in weight_names(module):
                found[f"{name}.{weight}"] = top_k_of(module), *sizes_of_expert(module, weight)
        elif isinstance(module, nn.MultiheadAttention):
            found[name] = 3, module.embed_dim, module.embed_dim  # its out_proj is a linear layer inside
        elif is_linear(module):
            sizes = sizes_of(module)
            assert sizes is not None
            found[name] = 1, *sizes
    return found
