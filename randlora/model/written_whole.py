"""A warning where transformers' own Trainer is about to write the whole base model into a checkpoint."""

from __future__ import annotations

import sys
import warnings


def warn_if_so() -> None:
    """To be called where a model with adapters is asked for its state dict.

    transformers' Trainer asks its own classes and PEFT's to save themselves, and any other model for its state dict. It
    tells nobody that it is a checkpoint that it wants, so that this looks at who has called. It only warns: other
    callers (``torch.distributed.checkpoint``, accelerate, scripts) rightly want all of the model.
    """
    save = getattr(getattr(sys.modules.get("transformers.trainer"), "Trainer", None), "_save", None)
    if save is None:
        return
    code, frame = getattr(save, "__code__", None), sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back  # type: ignore[assignment]
    if frame is not None:
        warnings.warn(
            "this checkpoint holds the whole base model: transformers.Trainer knows no other way for a model that is "
            "neither its own nor PEFT's. Take randlora.integrations.transformers.Trainer in its place (or its mixin "
            "AdapterCheckpoints; for TRL randlora.integrations.trl), which writes the adapters alone",
            stacklevel=3,
        )
