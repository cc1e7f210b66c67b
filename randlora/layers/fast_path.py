"""The fused inference path of torch's encoder layers, which reads weights and knows nothing of adapters: off and on."""

from __future__ import annotations

from torch import nn

from .randlora_layer import RandLoraLayer

# Attributes that torch reads only to decide on the fused path, and the value that rules it out.
_SWITCHES = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)
_SAVED = "_randlora_fast_path"


def disable_fast_path(module: nn.Module) -> None:
    """Make every ``nn.TransformerEncoderLayer`` and ``nn.TransformerEncoder`` in `module` call its adapted layers.

    In eval mode without gradients these read the weights of their parts and run one fused kernel, which knows nothing
    of adapters (on the attention, ``linear1`` or ``linear2``). Only those that contain adapted layers are switched, and
    their copies stay switched; call it again after adapting more layers. An encoder then no longer packs its batch into
    a nested tensor, so its results at padded positions are ordinary numbers, as in training, in place of zeros.
    """
    for part in module.modules():
        for cls, attribute, off in _SWITCHES:
            switchable = isinstance(part, cls) and hasattr(part, attribute) and _SAVED not in vars(part)
            if switchable and _is_adapted(part):
                setattr(part, _SAVED, getattr(part, attribute))
                setattr(part, attribute, off)


def restore_fast_path(module: nn.Module) -> None:
    """Undo :func:`disable_fast_path` in all of `module` that contains no adapted layers any more."""
    for part in module.modules():
        for cls, attribute, _ in _SWITCHES:
            if isinstance(part, cls) and _SAVED in vars(part) and not _is_adapted(part):
                setattr(part, attribute, getattr(part, _SAVED))
                delattr(part, _SAVED)


def _is_adapted(module: nn.Module) -> bool:
    return any(isinstance(part, RandLoraLayer) for part in module.modules())
