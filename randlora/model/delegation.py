"""A module that stands for another one: attributes that it lacks are read from that, and written to it."""

from __future__ import annotations

from typing import Any

from torch import nn


class Delegating(nn.Module):
    """Base class of :class:`randlora.RandLoraModel`. ``model`` is the module whose attributes it passes on."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # "model" is not there yet while copying; special methods are those of this class, accelerate's hooks those
            # of one module.
            if name in ("model", "_hf_hook", "_old_forward") or name.startswith("__"):
                raise
            return getattr(self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value) if self._owns(name) else setattr(self.model, name, value)

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name) if self._owns(name) else delattr(self.model, name)

    def _owns(self, name: str) -> bool:
        """Whether setting `name` means this object: what it has, what nobody has, private names, and ``model``."""
        kinds = ("_parameters", "_buffers", "_modules")
        return (
            name.startswith("_")  # by which other libraries hook into one object
            or name in self.__dict__
            or hasattr(type(self), name)
            or any(name in self.__dict__.get(kind, ()) for kind in kinds)
            or "model" not in self.__dict__.get("_modules", ())
            or not hasattr(self.model, name)
        )
