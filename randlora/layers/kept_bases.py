"""``randlora.keep_bases``: whether the dense bases of a model stay in memory between calls."""

from __future__ import annotations

from torch import nn

from .update import Update


def keep_bases(model: nn.Module, keep: bool = True, *, adapter_name: str | None = None) -> None:
    """Keep the dense bases of a model's adapters in memory, as is usual, or (False) make them anew in every pass.

    With ``keep_bases(model, False)`` nothing stays but a seed. Each layer makes the part of A and B that it needs, in
    the forward and again in the backward, and frees it at once; its attribute ``workspace`` bounds that too. The bases
    are the same bits, and results differ by no more than the order in which a library adds. Nothing else changes:
    what is saved, merged, compiled or sent between processes, and what autograd holds. Every process decides for
    itself, and may change its mind at any time.

    Bases belong to a process, so that this is set for all layers in it that share them, in other models as well.
    Adapters that are added later with bases of another definition keep them until this is called again.

    Args:
        model: any module with adapted layers in it, or such a layer.
        adapter_name: of the only adapter to be changed; default: all of them.

    Raises:
        ValueError: no such adapters, or bases among them that would not gain by it (all kinds but ``dense`` take next
            to no memory) or cannot be made from indices (given as tensors, or drawn by PEFT's generator); nothing is
            changed then. TypeError: `keep` is neither True nor False.
    """
    if keep not in (True, False):
        raise TypeError(f"keep must be True or False, got {keep!r}")
    layers = [module for module in model.modules() if isinstance(module, Update)]
    found = {
        id(bases): (name, bases)
        for layer in layers
        for name, bases in layer.bases.items()
        if adapter_name is None or name == adapter_name
    }
    if not found:
        what = "adapted layer" if adapter_name is None else f"adapter named {adapter_name!r}"
        raise ValueError(f"keep_bases needs a model with adapters, got a {type(model).__name__} without any {what}")
    for name, bases in found.values():
        if not keep and (reason := bases.why_kept()):
            raise ValueError(f"the bases of adapter {name!r} stay as they are: {reason}")
    for _, bases in found.values():
        bases.keep = keep
