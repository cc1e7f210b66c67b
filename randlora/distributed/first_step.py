"""What is looked at in the first training step of an engine: that the ranks agree, and that DDP knows what is trained.

Comparing is a collective: it runs by itself only where a call is certain to be made by all ranks.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..model.parts import adapted_layers
from ..private_torch import expects_uneven_inputs, reduced_by
from .agreement import compare
from .gathering import groups_of, is_split

# Per wrapper, which is made by all ranks at once, and per model inside it: how often its adapters had been switched
# when it was looked at. Beside the objects, as it is no part of their copies.
_looked_at: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, int]] = WeakKeyDictionary()
_reduced: WeakKeyDictionary[nn.Module, frozenset[int]] = WeakKeyDictionary()  # ids of parameters that a wrapper holds
_classes_seen: WeakKeyDictionary[nn.Module, set[type]] = WeakKeyDictionary()


def look(owner: nn.Module, ddp: nn.Module | None) -> None:
    """`owner`, the model with the adapters, is called in training mode with gradients, inside `ddp` or without.

    Raises:
        ValueError: as :func:`randlora.distributed.check_ranks`; adapters that `ddp` does not know.
    """
    if ddp is not None:
        _look_at_ddp(owner, ddp)
    # FSDP2 gives a class of its own to what it shards.
    seen = _classes_seen.setdefault(owner, set())
    if type(owner) not in seen:
        if groups := _holders(owner):
            compare(owner, groups)
        seen.add(type(owner))


def _look_at_ddp(owner: nn.Module, ddp: Any) -> None:
    # Without synchronisation, or with ranks that have run out of inputs, the others may not come here.
    if not ddp.require_backward_grad_sync or expects_uneven_inputs(ddp):
        return
    looked_at = _looked_at.setdefault(ddp, WeakKeyDictionary())
    switched = getattr(owner, "_switched", 0)
    if looked_at.get(owner) == switched:
        return
    # DDP's own rule: a part with trained parameters is called on every rank, unless it is to look for unused ones.
    whole = owner in (ddp.module, ddp.module._modules.get("base_model"))
    if owner not in looked_at and (whole or not ddp.find_unused_parameters):
        compare(owner, [ddp.process_group, *_holders(owner)])
    _check_reduced(owner, ddp)
    looked_at[owner] = switched


def _holders(owner: nn.Module) -> list[Any]:
    """The process groups that have parts of any parameter, by FSDP2 or tensor parallel: no rank is called alone there.

    Those of frozen weights, too: with both engines lambda is spread over one dimension of the mesh, and to tell its
    ranks alone that they differ would leave the others waiting for them.
    """
    return list(dict.fromkeys(group for p in owner.parameters() if is_split(p) for group in groups_of(p)))


def _check_reduced(owner: nn.Module, ddp: Any) -> None:
    """DDP averages the gradients of what required some when it was made: of nothing else, and of all of that."""
    if ddp not in _reduced:
        found = reduced_by(ddp)
        if found is None:
            return
        _reduced[ddp] = frozenset(map(id, found))
    reduced = _reduced[ddp]
    known = reduced.union(id(p) for name, p in ddp.module.named_parameters() if name in ddp.parameters_to_ignore)
    trained, frozen = [], []
    for name, parameter in owner.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            trained.append(name)
        elif not parameter.requires_grad and id(parameter) in reduced:
            frozen.append(name)
    again = "Activate adapters first and wrap the model in DistributedDataParallel then; wrap it again for others"
    if trained:
        raise ValueError(
            f"the gradients of {trained[0]} and {len(trained) - 1} other parameters would not be averaged over the "
            "ranks: they were not trained when DistributedDataParallel was put around the model, which knows no "
            f"others. {again}"
        )
    # While all adapters are disabled nobody waits: there will be no backward.
    acting = any(
        lam.requires_grad for layer in adapted_layers(owner).values() for lam in layer.randlora_lambda.values()
    )
    if frozen and acting and not ddp.find_unused_parameters:
        raise ValueError(
            f"DistributedDataParallel would wait for gradients of {frozen[0]} and {len(frozen) - 1} other parameters, "
            f"which were trained when it was put around the model and are frozen now. {again}"
        )
