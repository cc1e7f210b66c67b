"""What randlora takes of torch that torch does not promise to keep, each name with the public function that is missed.

No other file of randlora reads a private name of torch, but for the attributes that every subclass of ``nn.Module``
lives with (``tests/test_private_torch.py`` lists them, and looks whether the torch at hand has all of it still). All
names are bound here, when randlora is imported: no call of a layer pays for looking them up.

Imports nothing of randlora, so that the test can run it with a torch that randlora was not built for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule, graph_break
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "NonDynamicallyQuantizableLinear",
    "active_ddp",
    "below_autograd",
    "current_stream",
    "expects_uneven_inputs",
    "fake_mode",
    "graph_break",
    "in_transform",
    "is_compiled",
    "is_put_together",
    "is_watched",
    "jvp_levels",
    "parse_to",
    "reduced_by",
    "saved_tensors_hooks",
    "storage_identity",
    "tree_map",
    "unsafe_view",
    "was_distributed",
    "without_dispatch_modes",
    "without_torch_function",
    "without_transforms",
]

# ---- torch.func and forward-mode AD ----

_are_transforms_active = torch._C._are_functorch_transforms_active
_transforms = torch._C._functorch.get_interpreter_stack
_JVP = torch._C._functorch.TransformType.Jvp


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work: they know functions, and of an op's own autograd little.

    torch.compile, which knows ops, leaves functions with a rule for forward mode to eager execution. Missed: a question
    in ``torch.func``, and one in ``torch.autograd.forward_ad``, whose level can only be entered.
    """
    return _are_transforms_active() or forward_ad._current_level >= 0


def jvp_levels() -> int:
    """How many forward derivatives of torch.func are inside each other. Missed: what ``torch.func`` is doing."""
    return sum(level.key() == _JVP for level in _transforms() or ())


# A context in which what is made is no wrapper of torch.func's. Missed: a way out of a transform, for what outlives it.
without_transforms = torch._C._DisableFuncTorch

# ---- autograd ----

# A context in which an op runs without its node of autograd: inside an autograd.Function, which is a node itself.
# Missed: a public guard. torch.no_grad comes near, and still pays for the op's autograd kernel.
below_autograd = torch._C._AutoDispatchBelowAutograd

# A result that shares memory with its input and is no view of it, so that it may be written to in place, as what
# torch.nn.functional.linear returns. Missed: the same in public; a custom op would have to copy.
unsafe_view: Callable[[Tensor, Sequence[int]], Tensor] = torch.ops.aten._unsafe_view.default


def saved_tensors_hooks() -> Any:
    """The pack and unpack hooks of the innermost ``saved_tensors_hooks``, or None: checkpointing shows in them.

    Missed: whether a function is being checkpointed.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


# ---- dispatch: modes, fake tensors ----

# A context without __torch_function__ of modes and subclasses: torch.export would record a change of grad mode. torch's
# notes on extending it describe this class, by its private address.
without_torch_function = torch._C.DisableTorchFunction

# A context without any TorchDispatchMode. Missed: a way out of a mode, for what outlives it.
without_dispatch_modes = _disable_current_modes

# FakeTensor, FakeTensorMode: tensors without numbers for shapes on any device. torch.export and torch.compile put them
# in the place of parameters; randlora.estimate calls a model with them. Documented, never exported.

is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]  # left out of __all__
_number_of_modes = torch._C._len_torch_dispatch_stack
_get_mode = torch._C._get_dispatch_mode
_FAKE = torch._C._TorchDispatchModeKey.FAKE


def fake_mode() -> FakeTensorMode | None:
    """The FakeTensorMode that is at work. Missed: ``torch.fake_mode()``, or any question about modes."""
    mode: FakeTensorMode | None = _get_mode(_FAKE)
    return mode


def is_watched() -> bool:
    """Whether tensors here may stand for others that come later: in torch.func, under a mode, in torch.jit.trace.

    Missed: one question for all that records what is computed.
    """
    return _are_transforms_active() or is_tracing() or _number_of_modes() > 0


# ---- torch.compile ----

# graph_break: ends the graph of torch.compile where it is called. torch.compiler.disable does that around a function,
# which must then be called with the graph's tensors; torch's own documents name torch._dynamo.graph_break.


def is_compiled(module: nn.Module) -> bool:
    """Whether this very module is compiled, by ``torch.compile(module)`` or by its own ``compile()``.

    Missed: a question of ``torch.compiler`` about a module.
    """
    return module._compiled_call_impl is not None or isinstance(module, OptimizedModule)


# ---- DistributedDataParallel ----

# Without these names nothing fails: the ranks are not compared then, unless the user asks for it.


def active_ddp() -> Any:
    """The DistributedDataParallel whose forward is at work, or None. Missed: what torch.compile asks by it."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def expects_uneven_inputs(ddp: Any) -> bool:
    """Whether ``ddp.join()`` lets ranks end early, so that they may not be in a call. Missed: a question of Join."""
    return bool(getattr(getattr(ddp, "_join_config", None), "enable", False))


def reduced_by(ddp: Any) -> list[Tensor] | None:
    """The parameters whose gradients `ddp` averages: those that required some when it was made. None: not known.

    Missed: a list of them. It takes as much memory as their gradients, while it lasts.
    """
    buckets = getattr(getattr(ddp, "reducer", None), "_get_zeros_like_grad_buckets", None)
    return None if buckets is None else [parameter for bucket in buckets() for parameter in bucket.parameters()]


# ---- torch.distributed ----


def is_put_together(module: nn.Module) -> bool:
    """Whether FSDP2 (fully_shard) keeps parts of this very module's parameters, and puts them together for calls.

    Missed: that question. FSDPModule is the class of what fully_shard was called with, which need not be this module,
    and what is put together for a call is an ordinary parameter.
    """
    hooks = module._load_state_dict_post_hooks
    if not hooks:  # asked in every call inside inference_cache
        return False
    fsdp = "torch.distributed.fsdp._fully_shard."
    return any(getattr(hook, "__module__", "").startswith(fsdp) for hook in hooks.values())


# ---- the rest ----

# parse_to(*args, **kwargs): (device, dtype, non_blocking, memory_format) as Module.to reads them. Missed: that reading.
parse_to = torch._C._nn._parse_to

# current_stream(index): the current CUDA stream of a device as a number. torch.cuda.current_stream makes an object,
# which costs as much as a small kernel's launch.
if torch.backends.cuda.is_built():
    current_stream: Callable[[int], int] = torch._C._cuda_getCurrentRawStream
else:

    def _no_stream(index: int) -> int:
        raise RuntimeError(f"this torch, {torch.__version__}, is built without CUDA: device {index} has no stream")

    current_stream = _no_stream


def storage_identity(tensor: Tensor) -> int:
    """Equal for tensors of one storage, of fake tensors too, while they live. Missed: ``UntypedStorage.__eq__``; the
    address of the memory does not tell fake ones apart.
    """
    return int(tensor.untyped_storage()._cdata)


def was_distributed(module: nn.Module) -> bool:
    """Whether ``parallelize_module`` or ``distribute_module`` was applied to this module. Missed: a question for it."""
    return getattr(module, "_distribute_module_applied", False)


# NonDynamicallyQuantizableLinear: the class of nn.MultiheadAttention.out_proj, which the attention reads and never
# calls. Missed: its name in torch.nn, where it is told apart from an ordinary layer.

# tree_map: a function on everything in nested arguments. Missed: torch.utils.pytree without the underscore.
