"""Adapters that several layers inside one module have together: one that is added to some of them acts as the rest."""

from __future__ import annotations

from collections.abc import Iterable

from .randlora_layer import RandLoraLayer


class Together:
    """What `layers`, the adapted ones of a module, are now: those that join them later become so too."""

    def __init__(self, layers: Iterable[RandLoraLayer]) -> None:
        layers = list(layers)
        self._active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
        self._frozen = any(layer.inference_mode for layer in layers)
        self._disabled = any(layer.disable_adapters for layer in layers)

    def join(self, layer: RandLoraLayer) -> None:
        """Activate in `layer`, which was made or given an adapter just now, what is active in the others."""
        if self._disabled and not layer.disable_adapters:
            layer.enable_adapters(False)
        wanted = [name for name in self._active if name in layer.randlora_lambda]
        if self._active and (layer.active_adapters, layer.inference_mode) != (wanted, self._frozen):
            layer.set_adapter(wanted, inference_mode=self._frozen)
