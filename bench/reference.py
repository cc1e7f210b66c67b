"""What a model with adapters must compute: the same model in fp32 with ``W + dW`` in place of W, by the formula.

In the model's own dtype the same tells how far off rounding alone leads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bench import methods
from bench.methods import Pair


@dataclass(frozen=True)
class Update:
    """dW ``[out, in]`` of one layer as autograd sees it, and the copies of lambda and gamma it was made from."""

    weight: nn.Parameter
    value: Tensor
    sources: tuple[Tensor, ...]


def kind_of(name: str) -> str:
    """Methods of one kind have the same bases and so, for the same parameters, the same results."""
    return "dense" if name in methods.FAMILY else name


def merged(
    model: nn.Module, adapted: nn.Module, kind: str = "dense", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, list[Update]]:
    """`model` in `dtype` with the updates of `adapted` (a RandLoRA of this kind, or PEFT's LoRA) in its weights."""
    plain = methods.twin(model, own_weights=True).to(dtype)
    updates = []
    for name, module in methods.inner(adapted).named_modules():
        if hasattr(module, "lora_A"):
            weight = plain.get_submodule(name).weight
            product = module.lora_B["default"].weight.float() @ module.lora_A["default"].weight.float()
            updates.append(Update(weight, module.scaling["default"] * product, ()))
    for pair in methods.pairs(adapted):
        weight = plain.get_submodule(pair.name).weight
        updates.append(Update(weight, *_update(pair, weight, kind)))
    for update in updates:
        update.weight.data += update.value.detach()
    return plain, updates


def _update(pair: Pair, weight: Tensor, kind: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    import randlora

    lam, gamma = (p.detach().float().clone().requires_grad_() for p in (pair.lam, pair.gamma))
    (m, M), (r, n) = sorted(weight.shape), lam.shape
    bases = randlora.RandomBases(M, m, r, num_bases=n)
    if kind != "dense":  # their sparsity depends on the model's largest layer
        bases = pair.layer.bases["default"]
    A, B = bases.draw(torch.float32, weight.device)
    S2 = (lam[:, :, None] * A[:, :, :m] * gamma).flatten(0, 1)
    update = pair.scaling * bases.scale * B[:M, :n].flatten(1) @ S2
    return update if weight.shape[0] >= weight.shape[1] else update.T, (lam, gamma)
