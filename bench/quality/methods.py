"""The methods that are compared: what each puts on a model, and which learning rates are tried for it.

Every method adapts all linear layers but the head, and trains the head in full at a rate of its own: that is the same
for all, so that none is better for it. The baseline (`Task.untuned`) is the model from which all start.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from randlora.layers.initial import AUTO, GAIN, GAMMA

TRIES = 4  # learning rates of each method
HEAD_RATE = 1e-3
KINDS = ("dense", "hadamard", "sparse", "very_sparse")
RANKS = (8, 32, 128)

# Factors of three around what is usual. Ours is the same for all kinds and ranks: that is what alpha="auto" is for.
FULL_RATES = (2e-5, 6e-5, 2e-4, 6e-4)
LORA_RATES = (2e-4, 6e-4, 2e-3, 6e-3)
PEFT_RANDLORA_RATES = (1e-4, 3e-4, 1e-3, 3e-3)
OWN_RATES = (3e-4, 9e-4, 2.5e-3, 7.5e-3)

Groups = list[dict[str, Any]]
FULL = "full fine-tuning"


@dataclass(frozen=True)
class Method:
    """One line of the comparison.

    Attributes:
        name: "PEFT LoRA r=8", "hadamard r=32" ...
        build: ``build(model, head, seed) -> (adapted model, parameter groups)``; groups are dicts with "params" and
            either "factor", by which the learning rate under trial is multiplied, or "rate", which stays.
        rates: learning rates that are tried, from low to high; as many for every method.
        setting: what else decides the result. Rows of another setting are not taken for this one's.
        family: what is drawn in one colour; `rank` tells its points apart.
    """

    name: str
    build: Callable[[nn.Module, list[str], int], tuple[nn.Module, Groups]]
    rates: tuple[float, ...]
    setting: str = ""
    family: str = ""
    rank: int | None = None


def targets(model: nn.Module, head: Sequence[str]) -> list[str]:
    """Names of all linear layers but the head and what is below it. Raises ``ValueError`` if there is none."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    found = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not output and not within(name, head)
    ]
    if not found:
        raise ValueError(f"the model has no linear layer beside its head {list(head)}")
    return found


def within(name: str, head: Sequence[str]) -> bool:
    """Whether a module or parameter of this name belongs to the head."""
    return any(f".{part}." in f".{name}." for part in head)


def groups(adapted: nn.Module, head: Sequence[str]) -> Groups:
    """What is trained, the head apart."""
    trained = [(name, p) for name, p in adapted.named_parameters() if p.requires_grad]
    found = [
        {"params": [p for name, p in trained if not within(name, head)], "factor": 1.0},
        {"params": [p for name, p in trained if within(name, head)], "rate": HEAD_RATE},
    ]
    return [group for group in found if group["params"]]


# ---- how each is built ----


def full(model: nn.Module, head: list[str], seed: int) -> tuple[nn.Module, Groups]:
    return model, groups(model.requires_grad_(True), head)


def peft(model: nn.Module, head: list[str], seed: int, *, config: str, **fields: Any) -> tuple[nn.Module, Groups]:
    import peft as package

    if config == "RandLoraConfig":
        fields["projection_prng_key"] = seed
    with warnings.catch_warnings():  # of RandLoraConfig: that save_projection makes large files
        warnings.simplefilter("ignore")
        chosen = getattr(package, config)(target_modules=targets(model, head), modules_to_save=head or None, **fields)
        adapted = package.get_peft_model(model, chosen)
    return adapted, groups(adapted, head)


def own(model: nn.Module, head: list[str], seed: int, *, kind: str, rank: int) -> tuple[nn.Module, Groups]:
    import randlora

    config = randlora.RandLoraConfig(
        kind=kind, r=rank, randlora_alpha=AUTO, target_modules=targets(model, head),
        modules_to_save=head or None, projection_prng_key=seed,
    )  # fmt: skip
    adapted = randlora.get_peft_model(model, config)
    return adapted, groups(adapted, head)


# ---- the list ----


def _lora(name: str, rank: int, alpha: int, **fields: bool) -> Method:
    build = functools.partial(peft, config="LoraConfig", r=rank, lora_alpha=alpha, **fields)
    return Method(f"{name} r={rank}", build, LORA_RATES, f"alpha={alpha}", name, rank)


def _own(kind: str, rank: int) -> Method:
    build = functools.partial(own, kind=kind, rank=rank)
    return Method(f"{kind} r={rank}", build, OWN_RATES, own_setting(), kind, rank)


def own_setting() -> str:
    """The rule's constants."""
    return f"alpha={AUTO} gain={GAIN:g} gamma={GAMMA:g}"


def methods() -> dict[str, Method]:
    """By name, the most telling ones first: a run that is cut off has those for every task that it came to."""
    peft_randlora = Method(
        "PEFT RandLoRA r=32", functools.partial(peft, config="RandLoraConfig"), PEFT_RANDLORA_RATES, "alpha=640",
        "PEFT RandLoRA", 32,
    )  # fmt: skip
    listed = [
        Method(FULL, full, FULL_RATES, family=FULL),
        _lora("PEFT LoRA", 8, 16),
        _own("dense", 32),
        _own("hadamard", 32),
        _lora("PEFT LoRA", 32, 64),
        peft_randlora,
        # As large an update per number as of r = 8 with alpha 16: that is what the root of the rank is for.
        _lora("PEFT rsLoRA", 64, 16, use_rslora=True),
        _lora("PEFT DoRA", 16, 32, use_dora=True),
        *(_own(kind, rank) for kind in KINDS for rank in RANKS if kind in KINDS[:2] and rank != 32),
        *(_own(kind, rank) for kind in KINDS[2:] for rank in RANKS),
    ]
    return {method.name: method for method in listed}


QUICK = (FULL, "PEFT LoRA r=8", "hadamard r=32", "PEFT RandLoRA r=32")


def tried(rates: Sequence[float], tries: int) -> tuple[float, ...]:
    """The middle `tries` of `rates`: the outer ones are for finding that the best one is not among them."""
    start = (len(rates) - tries) // 2
    return tuple(rates[start : start + tries])
