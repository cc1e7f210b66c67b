"""PEFT's RandLoRA layers turned into randlora's, in place."""

from __future__ import annotations

import sys
from typing import Any

from peft.tuners import randlora as peft_randlora

from ...layers import quantized
from .layer import AcceleratedLinear


def convert(layer: Any) -> AcceleratedLinear:
    """Turn a RandLoRA layer of PEFT, whatever its base layer, into a :class:`AcceleratedLinear` in place.

    Its containers of bases must be ``Bases``. The layer stays the object that PEFT made: its parent, its hooks and
    users' variables refer to it, and its parameters are in an optimizer. So it is given another class, not replaced.
    """
    layer.__class__ = _class_for(type(layer))
    layer.__dict__.setdefault("is_target_conv_1d_layer", False)
    layer.refer_to_bases()
    quantized.prepare(layer.get_base_layer())
    return layer


_FOR_QUANTIZED = {"AcceleratedLinear8bitLt": "Linear8bitLt", "AcceleratedLinear4bit": "Linear4bit"}


def _class_for(theirs: type) -> type[AcceleratedLinear]:
    """:class:`AcceleratedLinear`, or the same as an instance of PEFT's class for layers of bitsandbytes as well."""
    for name, base in _FOR_QUANTIZED.items():
        if theirs.__name__ == base and theirs.__module__ == "peft.tuners.randlora.bnb":
            found: type[AcceleratedLinear] = getattr(sys.modules[__name__], name)
            return found
    return AcceleratedLinear


def __getattr__(name: str) -> Any:
    """These classes are made when they are needed, by pickles for one: PEFT's are there only with bitsandbytes."""
    if name not in _FOR_QUANTIZED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    theirs = getattr(peft_randlora, _FOR_QUANTIZED[name])
    made = type(theirs.__name__, (AcceleratedLinear, theirs), {"__module__": __name__, "__qualname__": name})
    globals()[name] = made
    return made
