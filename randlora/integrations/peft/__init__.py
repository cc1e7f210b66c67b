"""PEFT's own RandLoRA, computed by randlora.

    import randlora.integrations.peft
    randlora.integrations.peft.enable()

From there on PEFT's ``RandLoraConfig`` gives models whose layers keep their input for backward and nothing else, and
whose files hold the bases once; scripts stay as they are. ``docs/peft.md`` lists what changes.

Names of PEFT that begin with an underscore are used here where its tuners and wrappers can be extended in no other
way. They may change with any version: :data:`TESTED` says with which ones this is tested.
"""

from __future__ import annotations

import importlib.metadata
import warnings
from typing import Any

from torch import nn

__all__ = ["Enabled", "accelerate", "disable", "enable"]

TESTED = ((0, 16), (0, 21))  # the first minor version of PEFT that has RandLoRA, the last that this is tested with

_replaced: list[tuple[Any, Any, Any]] = []  # (object, attribute or key, what PEFT has there)


def enable(prng: str = "peft") -> Enabled:
    """Make every RandLoRA model that PEFT builds from now on use randlora; also ``with enable(): ...``.

    Models that exist keep PEFT's layers (:func:`accelerate` converts them), and models built while this was enabled
    keep randlora's after :func:`disable`.

    Args:
        prng: ``"peft"``: dense bases are drawn in bfloat16, as PEFT does on every machine that has it, here whatever
            the machine has. ``"peft-fp16"``: in float16, for adapters that PEFT saved without their projections on a
            machine without bfloat16.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: another `prng`.

    With a version of PEFT that this is not tested with it warns and changes nothing.
    """
    if prng not in ("peft", "peft-fp16"):
        raise ValueError(f"prng must be 'peft' or 'peft-fp16', got {prng!r}")
    if not _is_tested():
        return Enabled(None)
    from .model import HALF, AcceleratedRandLoraModel

    before = AcceleratedRandLoraModel.half if _replaced else None
    AcceleratedRandLoraModel.half = HALF[prng]
    if not _replaced:
        for where, name, replacement in _replacements(AcceleratedRandLoraModel):
            _replaced.append((where, name, _exchange(where, name, replacement)))
    return Enabled(before)


def disable() -> None:
    """Give PEFT its own classes back."""
    while _replaced:
        _exchange(*_replaced.pop())


def accelerate(model: nn.Module) -> nn.Module:
    """Convert the RandLoRA layers of a PEFT model that exists, in place, and return it.

    Parameters stay the same objects, so optimizers and their state go on; so do the values of the bases, their names
    and the adapters' states. Works on a ``PeftModel`` and on a model with injected adapters, enabled or not.

    Raises:
        ImportError: PEFT is not installed.
        ValueError: no RandLoRA layers, merged ones, or ones that PEFT itself cannot compute; nothing is changed then.
        TypeError: layers of a class derived from PEFT's.

    With a version of PEFT that this is not tested with it warns and changes nothing.
    """
    if not _is_tested():
        return model
    from . import model as peft_model

    return peft_model.accelerate(model)


class Enabled:
    """What :func:`enable` returns: leaving it as a context restores what was before."""

    def __init__(self, half: Any) -> None:
        self._half = half  # None: nothing was enabled before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_) -> None:
        if self._half is None:
            disable()
        elif _replaced:
            from .model import AcceleratedRandLoraModel

            AcceleratedRandLoraModel.half = self._half


def _replacements(tuner: type) -> list[tuple[Any, Any, Any]]:
    """Everything in PEFT that is replaced, as (object, attribute or key, replacement)."""
    import peft

    from . import files

    reading = peft.utils.save_and_load
    set_state_dict = files.renaming(reading.set_peft_model_state_dict)
    return [
        (peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.RANDLORA, tuner),  # what PEFT looks tuners up in
        (peft, "RandLoraModel", tuner),  # these for those who construct it themselves
        (peft.tuners, "RandLoraModel", tuner),
        (peft.tuners.randlora, "RandLoraModel", tuner),
        (reading, "safe_load_file", files.checked(reading.safe_load_file)),
        *(
            (where, "set_peft_model_state_dict", set_state_dict)
            for where in (peft, peft.utils, peft.peft_model, reading)
        ),
    ]


def _exchange(where: Any, name: Any, new: Any) -> Any:
    """Put `new` there and return what was there."""
    if isinstance(where, dict):
        old, where[name] = where[name], new
    else:
        old = getattr(where, name)
        setattr(where, name, new)
    return old


def _is_tested() -> bool:
    try:
        version = importlib.metadata.version("peft")
    except importlib.metadata.PackageNotFoundError:
        raise ImportError("randlora.integrations.peft needs PEFT: pip install peft") from None
    major, minor = (int(part) for part in version.split(".")[:2])
    if TESTED[0] <= (major, minor) <= TESTED[1]:
        return True
    first, last = (".".join(map(str, pair)) for pair in TESTED)
    warnings.warn(
        f"randlora.integrations.peft is tested with PEFT {first} to {last}, found is {version}: PEFT's own RandLoRA is "
        "left as it is",
        stacklevel=3,
    )
    return False
