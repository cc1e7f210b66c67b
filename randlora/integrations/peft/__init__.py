"""PEFT's own RandLoRA, computed by randlora.

    import randlora.integrations.peft
    randlora.integrations.peft.enable()

From there on PEFT's ``RandLoraConfig`` gives models whose layers keep their input for backward and nothing else, and
whose files hold the bases once; scripts stay as they are. ``docs/peft.md`` lists what changes.

Names of PEFT that begin with an underscore are used here where its tuners and wrappers can be extended in no other
way. They may change with any version: :data:`TESTED` says with which ones this is tested.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["Enabled", "accelerate", "disable", "enable"]

TESTED = ((0, 16), (0, 21))  # the first minor version of PEFT that has RandLoRA, the last that this is tested with

_logger = logging.getLogger(__name__)
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

    With a version of PEFT that this is not tested with, the first call compares PEFT's own code with randlora's on a
    tiny model, in about a second (``python -m randlora check-peft`` shows what is compared). Where they differ, PEFT's
    own RandLoRA stays as it is, and a warning names what differs.
    """
    if prng not in ("peft", "peft-fp16"):
        raise ValueError(f"prng must be 'peft' or 'peft-fp16', got {prng!r}")
    return _enable(prng) if _agrees() else Enabled(None)


def _enable(prng: str) -> Enabled:
    from .model import HALF, AcceleratedRandLoraModel

    before = AcceleratedRandLoraModel.half if _replaced else None
    AcceleratedRandLoraModel.half = HALF[prng]
    if not _replaced:
        try:
            for where, name, replacement in _replacements(AcceleratedRandLoraModel):
                _replaced.append((where, name, _exchange(where, name, replacement)))
        except BaseException:
            disable()
            raise
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

    With a version of PEFT that this is not tested with it looks first, as :func:`enable` does.
    """
    if not _agrees():
        return model
    from . import model as peft_model

    return peft_model.accelerate(model)


class Enabled:
    """What :func:`enable` returns: leaving it as a context restores what was before."""

    def __init__(self, half: Any) -> None:
        self._half = half  # None: nothing was enabled before

    def __enter__(self) -> Enabled:
        return self

    def __exit__(self, *_: object) -> None:
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


@contextlib.contextmanager
def switched(on: bool, prng: str = "peft") -> Iterator[None]:
    """Enabled, or not, while this lasts, whatever version of PEFT is there; then all is as it was before."""
    if on:
        with _enable(prng):
            yield
        return
    ours = [(where, name, _exchange(where, name, theirs)) for where, name, theirs in _replaced]
    kept, _replaced[:] = _replaced[:], []
    try:
        yield
    finally:
        _replaced[:] = kept
        for where, name, replacement in ours:
            _exchange(where, name, replacement)


# ---- versions ----

_agreed: dict[str, bool] = {}  # version of PEFT that is not tested -> whether it was found to agree


def version_of_peft() -> str:
    """Of the PEFT that is imported, which need not be the one that is installed. Raises ``ImportError``."""
    try:
        import peft
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError("randlora.integrations.peft needs PEFT: pip install peft") from None
    return peft.__version__


def is_tested(version: str) -> bool:
    """Whether this version of PEFT is one of :data:`TESTED`."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is not None and TESTED[0] <= (int(found[1]), int(found[2])) <= TESTED[1]


def compare() -> dict[str, str | None]:
    """What was compared between PEFT's own RandLoRA and randlora's: None where they agree, else what differs.

    See :mod:`randlora.integrations.peft.self_check`.
    """
    try:
        from . import self_check
    except Exception as error:  # of whatever a version that nobody has seen lacks or raises
        return {"what randlora takes from PEFT": f"{type(error).__name__}: {error}"}
    return self_check.compare()


def _agrees() -> bool:
    """Whether PEFT is of a tested version, or of one that was found to agree. Found out, and told, once."""
    version = version_of_peft()
    if is_tested(version):
        return True
    if version not in _agreed:
        differences = [f"{what} ({how})" for what, how in compare().items() if how is not None]
        _agreed[version] = not differences
        first, last = (".".join(map(str, pair)) for pair in TESTED)
        known = f"randlora.integrations.peft is tested with PEFT {first} to {last}, found is {version}"
        if differences:
            more = f"; and {len(differences) - 2} more" if len(differences) > 2 else ""
            warnings.warn(
                f"{known}. PEFT's own RandLoRA is left as it is, because the two differ: "
                f"{'; '.join(differences[:2])}{more}. `python -m randlora check-peft` shows all that was compared",
                stacklevel=3,
            )
        else:
            _logger.info("%s. All that was compared agrees: randlora is on", known)
    return _agreed[version]
