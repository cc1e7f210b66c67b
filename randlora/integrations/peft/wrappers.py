"""What stands beside the adapters in a PEFT model: ``modules_to_save``, which are trained in full, and their like."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, _set_adapter
from torch import nn

from ...layers import offload
from ...layers.mixed_batch import MixedBatch, mixed_batch, refuse_experts, run_apart


def wrappers(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    return [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]


# ---- loading ----


def saved_names(model: nn.Module, adapter: str) -> Iterator[str]:
    """What PEFT calls the tensors of the copies of `adapter` in a file."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and adapter in module._adapters:
            yield from (f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter))


def make_room(model: nn.Module, adapter: str) -> None:
    """Memory for the copies of `adapter` that have none: of a base on meta, or of an offloaded one.

    PEFT's copy of an offloaded module would go on taking the numbers of the base.
    """
    for wrapper in wrappers(model):
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter not in wrapper.modules_to_save:
            continue
        copied, original = wrapper.modules_to_save[adapter], wrapper.original_module
        if not any(tensor.is_meta for tensor in (*copied.parameters(), *copied.buffers())):
            continue
        if any(map(offload.hooks, original.modules())):
            room = offload.copy_of(original)
        else:
            offload.make_room_in(room := copied)
        for parameter, before in zip(room.parameters(), copied.parameters(), strict=True):
            parameter.requires_grad_(before.requires_grad)
        wrapper.modules_to_save[adapter] = room.train(copied.training)


# ---- which adapter's copy acts ----


def activate(model: nn.Module, adapters: Sequence[str]) -> None:
    """Let every wrapper run the copy of the one of `adapters` that has one there.

    PEFT asks it only of wrappers that the adapter which it deletes has a copy in.
    """
    for wrapper in wrappers(model) if adapters else ():
        wanted = [name for name in adapters if name in wrapper._adapters][:1]
        if wanted != wrapper.active_adapters:
            _set_adapter(wrapper, *(wanted or adapters[:1]))  # a name without a copy: the module as it was


class Trainability:
    """What of a module was trained while its adapters were active. PEFT trains all active ones once they are back."""

    KEY = "_randlora_trainability"

    def __init__(self, module: nn.Module) -> None:
        self.active = list(module.active_adapters)
        self.flags = [(parameter, parameter.requires_grad) for parameter in self.parameters(module)]

    @staticmethod
    def parameters(module: nn.Module) -> Iterator[nn.Parameter]:
        """Those of its adapters. Earlier versions of PEFT train what is beneath them while they are disabled."""
        for name, child in module.named_children():
            if name not in ("base_layer", "original_module"):
                yield from child.parameters()

    @classmethod
    def note(cls, module: nn.Module) -> None:
        """Before the adapters of `module` are disabled."""
        if not module.disable_adapters:
            vars(module)[cls.KEY] = cls(module)

    @classmethod
    @contextmanager
    def kept(cls, module: nn.Module) -> Iterator[None]:
        """Around enabling the adapters of `module`. What is made trainable in the meantime stays so."""
        noted = vars(module).pop(cls.KEY, None)
        now = {id(parameter) for parameter in cls.parameters(module) if parameter.requires_grad}
        yield
        if noted is not None and noted.active == module.active_adapters:
            for parameter, flag in noted.flags:
                parameter.requires_grad_(flag or id(parameter) in now)


# ---- batches of mixed adapters ----


class _InMixedBatch:
    """What takes part in a mixed batch for one of PEFT's wrappers (:class:`randlora.layers.mixed_batch.Mixable`)."""

    mixed_batch: MixedBatch | None = None

    def __init__(self, wrapper: AuxiliaryTrainingWrapper, layers: Sequence[nn.Module]) -> None:
        self.wrapper, self.layers, self.adapters = wrapper, layers, set(wrapper._adapters)

    def mixable_adapters(self) -> set[str]:
        return self.adapters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """In place of the wrapper's: PEFT's takes few kinds of modules, and looks at the active adapter first."""
        wrapper = self.wrapper
        # Not what the wrapper says: earlier versions of PEFT disable those in which the active adapter has no copy.
        if any(layer.disable_adapters for layer in self.layers):
            return wrapper.original_module(*args, **kwargs)

        def call(name: str, args: tuple, kwargs: dict) -> Any:
            if name not in self.adapters:
                return wrapper.original_module(*args, **kwargs)
            if isinstance(wrapper, ModulesToSaveWrapper):
                return wrapper.modules_to_save[name](*args, **kwargs)
            x, *others = args
            return wrapper._forward_wrapped_mixed_batch(x, name, *others, **kwargs)

        return run_apart(self.mixed_batch, type(wrapper.original_module).__name__, call, args, kwargs)


@contextmanager
def mixed_batch_with_wrappers(
    model: nn.Module, layers: Sequence[nn.Module], names: Sequence[str] | None
) -> Iterator[None]:
    """:func:`randlora.layers.mixed_batch.mixed_batch` for the layers of a PEFT model and for its wrappers."""
    parts = [] if names is None else [_InMixedBatch(wrapper, layers) for wrapper in wrappers(model)]
    refuse_experts(model, [part.wrapper for part in parts])
    with mixed_batch(model, [*layers, *parts], names), ExitStack() as stack:
        for part in parts:
            stack.callback(_replace_forward(part.wrapper, part.forward))
        yield


def _replace_forward(module: nn.Module, forward: Callable) -> Callable[[], None]:
    """Returns what undoes it. An instance may have a `forward` of its own already (accelerate's hooks)."""
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = forward

    def undo() -> None:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before

    return undo
