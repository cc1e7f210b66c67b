"""Layers whose numbers are brought in for their calls only, as accelerate offloads them to the CPU or to disk.

``cpu_offload``, ``disk_offload`` and ``dispatch_model`` (``device_map``) leave a module's tensors on the meta device
between calls, and a hook on the module that gets them from a mapping. It stands in the attribute ``_hf_hook``, so
accelerate need not be imported here. Tensors on meta without such a hook have no numbers at all, and what would lose
others for them, or compute with them as if they had some, is refused.
"""

from __future__ import annotations

import copy
from collections import ChainMap
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.zero3 import gathered

REAL_AGAIN = "accelerate.hooks.remove_hook_from_submodules(model)"


def hooks(module: nn.Module) -> list[Any]:
    """The hooks that bring the tensors of `module` in for a call, in the order in which they act."""
    return [hook for hook in _all_hooks(module) if getattr(hook, "offload", False) is True]


def _all_hooks(module: nn.Module) -> tuple[Any, ...]:
    hook = vars(module).get("_hf_hook")
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module computes; None if it is not offloaded."""
    found = hooks(module)
    if not found:
        return None
    device = found[-1].execution_device
    return torch.device("cpu" if device is None else device)


def input_device(module: nn.Module) -> torch.device | None:
    """Where accelerate takes the inputs of a module, be it offloaded or one of several devices'; None if nowhere."""
    found = [
        hook.execution_device for hook in _all_hooks(module) if getattr(hook, "execution_device", None) is not None
    ]
    return torch.device(found[-1]) if found else execution_device(module)


def device_of(module: nn.Module, tensor: Tensor) -> torch.device:
    """Where the numbers of a tensor of `module` are in its calls: meta only if there are none."""
    return (execution_device(module) or tensor.device) if tensor.is_meta else tensor.device


def read(module: nn.Module, name: str) -> Tensor:
    """The tensor `name` of `module` itself; if it is offloaded, its numbers on the execution device, read-only.

    Raises:
        ValueError: an offloaded tensor that the hook does not know.
    """
    tensor: Any = module._parameters[name] if name in module._parameters else getattr(module, name)
    found = hooks(module)
    if not (tensor.is_meta and found):
        return tensor
    try:
        value = _find(found[-1].weights_map, name)
    except KeyError as error:
        raise ValueError(f"{name!r} is offloaded, but where to is not known: {error} is not there") from error
    return value.detach().to(execution_device(module), tensor.dtype)


def _find(weights: Any, name: str) -> Tensor:
    try:
        return weights[name]
    except KeyError:
        # PeftModel.from_pretrained writes the files of what is on disk anew, with the adapter's name before that of the
        # parameter: it has modules in mind, like LoRA's.
        layer, _, part = getattr(weights, "prefix", "").removesuffix(".").rpartition(".")
        if (moved := f"{layer}.{name}.{part}") not in getattr(weights, "dataset", ()):
            raise
        return weights.dataset[moved]


def write(module: nn.Module, name: str, value: Tensor) -> None:
    """Let calls of an offloaded `module` find `value` under `name`. It is kept in memory; files stay as they are."""
    for hook in hooks(module):
        if not isinstance(hook.weights_map, ChainMap):
            hook.weights_map = ChainMap({}, hook.weights_map)
        hook.weights_map[name] = value.detach().cpu()


def fill(parameters: nn.ParameterDict, adapter_name: str, value: float) -> None:
    """Lambda or gamma of an adapter becomes this one number, also where it is offloaded."""
    with torch.no_grad():
        parameter = parameters[adapter_name].fill_(value)
    if parameter.is_meta and hooks(parameters):
        write(parameters, adapter_name, torch.full_like(parameter, value, device="cpu"))


def forget(module: nn.Module, name: str) -> None:
    """Before a tensor of `module` is deleted: its hooks would look for it when they are removed."""
    for hook in hooks(module):
        hook.original_devices.pop(name, None)


def held(parameters: nn.ParameterDict, adapter: str) -> Tensor:
    """``parameters[adapter]``, in a tenth of the time."""
    parameter = parameters._parameters.get(adapter)
    return parameters[adapter] if parameter is None else parameter


def trained(parameters: nn.ParameterDict, adapter: str, what: str, device: torch.device) -> Tensor:
    """lambda or gamma of an adapter (`what`), as a call on `device` takes it.

    Raises:
        ValueError: it is on the meta device, has not been offloaded, and the call is not on meta.
    """
    parameter = held(parameters, adapter)
    if parameter.device == device or parameter.is_meta == (device.type == "meta"):
        return parameter
    if not parameter.is_meta:
        return parameter.to(device)  # shapes are asked for, no numbers
    value = read(parameters, adapter)
    if value.is_meta:
        raise ValueError(
            f"{what}[{adapter!r}] is on the meta device, it has no numbers: load an adapter, or make it with "
            "model.to_empty(device=...) and the layers' reset_parameters()"
        )
    if parameter.requires_grad and torch.is_grad_enabled():
        value.requires_grad_().register_hook(_lost)
    return value


def _lost(grad: Tensor) -> None:
    raise RuntimeError(
        "lambda and gamma were offloaded after adapting, so their gradients would be lost: adapt the model after it is "
        f"offloaded, or give it its parameters back with {REAL_AGAIN}"
    )


def with_numbers(model: nn.Module, tensors: dict[str, Any]) -> dict[str, Any]:
    """`tensors` of `model` (its own objects), those that are offloaded brought in; what is no tensor stays as it is.

    Raises:
        ValueError: one that is on the meta device and has not been offloaded.
    """
    owners = {
        id(tensor): (module, name)
        for module in model.modules()
        if hooks(module)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
    }
    found = {
        key: read(*owners[id(value)]) if _is_meta(value) and id(value) in owners else value
        for key, value in tensors.items()
    }
    if missing := sorted(key for key, value in found.items() if _is_meta(value)):
        raise ValueError(f"{missing[0]} is on the meta device: it has no numbers to save")
    return found


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_meta


def require_numbers(tensor: Tensor, what: str, purpose: str) -> None:
    """Raises ``ValueError`` if `tensor` is on the meta device."""
    if tensor.is_meta:
        raise ValueError(f"{what} is on the meta device: it has no numbers {purpose}. Load the weights first")


def check_targets(
    model: nn.Module,
    targets: Iterable[str],
    trained_biases: Iterable[nn.Module] = (),
    trained_modules: Iterable[str] = (),
) -> None:
    """Raises ``ValueError`` for what cannot be adapted while it is offloaded.

    Args:
        targets: names of the modules to adapt. trained_biases: modules whose biases are to be trained.
        trained_modules: names of modules of which copies are to be trained that would be offloaded, too.
    """
    for name in targets:
        parts = name.split(".")
        for parent in (".".join(parts[:i]) for i in range(len(parts))):
            module = model.get_submodule(parent)
            if any(hook.place_submodules for hook in hooks(module)):
                raise ValueError(
                    f"{name!r} cannot be adapted: {parent or 'the model'} is offloaded with all of its parts at once "
                    "(preload_module_classes), by names that adapting changes: adapt the model first, or offload it "
                    "without preload_module_classes"
                )
        module = model.get_submodule(name)
        if isinstance(module, nn.MultiheadAttention) and any(hooks(part) for part in module.modules()):
            raise ValueError(
                f"{name!r} cannot be adapted while it is offloaded: its weights are taken apart. Call {REAL_AGAIN} and "
                "offload the adapted model"
            )
    for module in trained_biases:
        if hooks(module):
            raise ValueError(
                f"biases cannot be trained while they are offloaded, that of a {type(module).__name__} is: take "
                f"bias='none', or call {REAL_AGAIN} first"
            )
    for name in trained_modules:
        if any(map(hooks, model.get_submodule(name).modules())):
            raise ValueError(
                f"modules_to_save: {name!r} cannot be trained while it is offloaded, its gradients would be lost: call "
                f"{REAL_AGAIN} first"
            )


def make_room(held: dict[str, Any], name: str, device: torch.device) -> None:
    """Memory for a tensor on meta, put where it is held: accelerate's init_empty_weights undoes other assignments."""
    tensor = held[name]
    if tensor is not None and tensor.is_meta:
        room = torch.empty_like(tensor, device=device)
        held[name] = nn.Parameter(room, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else room


def make_room_in(module: nn.Module) -> None:
    """Memory on the CPU for all that the state dict of `module` has, before it is loaded."""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name in held.keys() - part._non_persistent_buffers_set:  # what is not saved gets no numbers
                make_room(held, name, torch.device("cpu"))


def copy_of(module: nn.Module) -> nn.Module:
    """A deep copy that holds its numbers itself, where `module` computes: what is offloaded cannot be trained."""
    offloading = {id(hook): hook for part in module.modules() for hook in hooks(part)}
    # In the copy each of these hooks still moves inputs, but has no mapping, which would be copied too.
    with gathered(module.parameters()):
        twin = copy.deepcopy(module, {key: _moving_inputs(hook) for key, hook in offloading.items()})
    for old, new in zip(module.modules(), twin.modules(), strict=True):
        if not hooks(old):
            continue
        for name, parameter in old._parameters.items():
            if parameter is not None and parameter.is_meta:
                new._parameters[name] = nn.Parameter(read(old, name).clone(), parameter.requires_grad)
        for name, buffer in old._buffers.items():
            if buffer is not None and buffer.is_meta:
                new._buffers[name] = read(old, name).clone()
    return twin


def _moving_inputs(hook: Any) -> Any:
    return type(hook)(hook.execution_device, io_same_device=hook.io_same_device, skip_keys=hook.skip_keys)
