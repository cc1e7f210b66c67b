"""A training step of a whole model under one method: made, checked, and what it keeps and takes in memory.

Checked is that adapters leave the model as it is at the start, and of every RandLoRA that with random parameters it
gives the loss and the gradients that the formula gives, on bases that all of the same kind share. A deep model in 16
bits rounds so often that its gradients are off by a tenth whatever computes them: more than the tolerance is allowed up
to twice what the formula itself, merged into the weights of that dtype, is off by.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench import methods, peak, reference, shapes
from bench.measure import Provider, dtype_name
from bench.methods import Setting
from bench.shapes import Inputs, Shape, Size

LEARNING_RATE = 1e-4
# Relative errors of a loss and of all gradients of lambda and gamma, against the same model in fp32.
TOLERANCE = {"float32": (1e-4, 2e-3), "tf32": (2e-3, 0.03), "bfloat16": (0.01, 0.05)}
CHECKED_TOKENS = 1024  # of a batch, for gradients: the reference is a model in fp32 with gradients of its weights


class Training:
    """One model at one size. :meth:`provider` gives the calls to be timed.

    Attributes:
        found: method -> further columns of its row, known after its provider was set up.
    """

    def __init__(self, shape: Shape, size: Size, setting: Setting, device: str) -> None:
        self.shape, self.size, self.setting, self.device = shape, size, setting, device
        self.model = shape.build(size.depth, size.vocab, dtype=size.dtype, device=device).requires_grad_(False)
        self.inputs = shape.inputs(size, device)
        samples = max(1, CHECKED_TOKENS // size.tokens)
        self.checked = {name: tensor[:samples] for name, tensor in self.inputs.items()}
        with torch.no_grad():
            self.loss = shape.loss(self.model, self.inputs).item()
        self.found: dict[str, dict[str, Any]] = {}
        self._expected: dict[str, tuple[float, list[Tensor]]] = {}  # by kind of bases
        self._rounding: dict[str, float] = {}  # likewise, of the gradients

    def provider(self, name: str) -> Provider:
        adapted = methods.adapt(name, self.model, self.setting)
        saved, loss = saved_bytes(adapted, lambda: self.shape.loss(adapted, self.inputs))
        trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        self.found[name] = {"trainable_parameters": trained, "saved_bytes": saved}
        error = abs(loss.item() - self.loss) / self.loss
        del loss
        assert error < self.tolerance[0], f"the loss is off by {error:.1e} before anything is trained"
        if methods.pairs(adapted):
            error = max(error, self._error_with_random_parameters(name, adapted))
        run = step(self.shape, adapted, self.inputs)
        return Provider(lambda: (run(), error))

    @staticmethod
    def check(result: tuple[Tensor, float]) -> float:
        loss, error = result
        assert torch.isfinite(loss), f"loss {loss.item()}"
        return error

    @property
    def tolerance(self) -> tuple[float, float]:
        return TOLERANCE[dtype_name(self.size.dtype)]

    def _error_with_random_parameters(self, name: str, adapted: nn.Module) -> float:
        if name.startswith("PEFT"):
            methods.set_bases(adapted)
        kind = reference.kind_of(name)
        if kind not in self._expected:
            self._expected[kind] = self._by_hand(adapted, kind)
        with methods.random_parameters(adapted):
            loss = self.shape.loss(adapted, self.checked)
            parameters = [p for pair in methods.pairs(adapted) for p in (pair.lam, pair.gamma)]
            gradients = torch.autograd.grad(loss, parameters)
        expected, expected_gradients = self._expected[kind]
        of_loss = abs(loss.item() - expected) / expected
        of_gradients = _largest_error(gradients, expected_gradients)
        assert of_loss < self.tolerance[0], f"with random parameters the loss is off by {of_loss:.1e}"
        if of_gradients >= self.tolerance[1] and self.size.dtype.itemsize == 2:
            if kind not in self._rounding:
                rounded = self._by_hand(adapted, kind, self.size.dtype)[1]
                self._rounding[kind] = _largest_error(rounded, expected_gradients)
            allowed = 2 * self._rounding[kind]
            assert of_gradients < allowed, f"the gradients are off by {of_gradients:.1e}, of {allowed:.1e} allowed"
        else:
            assert of_gradients < self.tolerance[1], f"the gradients are off by {of_gradients:.1e}"
        return max(of_loss, of_gradients)

    def _by_hand(self, adapted: nn.Module, kind: str, dtype: torch.dtype = torch.float32) -> tuple[float, list[Tensor]]:
        """Loss and gradients of all lambda and gamma, through the merged weights' gradients, the model in `dtype`."""
        with methods.random_parameters(adapted):
            plain, updates = reference.merged(self.model, adapted, kind, dtype)
        weights = [update.weight.requires_grad_() for update in updates]
        inputs = {k: t.to(dtype) if t.is_floating_point() else t for k, t in self.checked.items()}
        loss = self.shape.loss(plain, inputs)
        gradients = torch.autograd.grad(loss, weights)
        found: list[Tensor] = []
        for update, gradient in zip(updates, gradients, strict=True):
            found += torch.autograd.grad(update.value, update.sources, gradient.float())
        return loss.item(), found

    def multiply_adds(self) -> int:
        """Of the frozen model, forward and backward to its embeddings: what no method can do without.

        Counted on one sample, as the form of attention that can be counted takes memory.
        """
        from torch.utils.flop_counter import FlopCounterMode

        # The mathematical form of attention, as the counter does not know the CPU's fused one.
        counter = FlopCounterMode(display=False)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
            self.shape.loss(self.model, {name: tensor[:1] for name, tensor in self.inputs.items()}).backward()
        return self.size.batch * counter.get_total_flops() // 2

    def peak_bytes(self, name: str) -> int:
        """Above the frozen model's weights at the peak of a training step, optimizer state and bases included."""
        arguments = self.shape.name, self.size, self.setting, self.device, name
        if torch.device(self.device).type == "cuda":
            return _peak_cuda(self.model, *arguments)
        return peak.in_a_process(_peak_cpu, torch.get_num_threads(), *arguments)


def _largest_error(found: Sequence[Tensor], true: Sequence[Tensor]) -> float:
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True))


def step(shape: Shape, adapted: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    """A training step of what is trainable, if anything is; returns the loss."""
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE) if trained else None

    def run() -> Tensor:
        loss = shape.loss(adapted, inputs)
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    run.state = lambda: [] if optimizer is None else _tensors(optimizer.state.values())
    return run


def _tensors(states: Iterable[dict[str, Any]]) -> list[Tensor]:
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


# ---- memory ----


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the distinct storages behind `tensors`."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _parts(tensors)}


def _parts(tensors: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors that have a storage: a quantised weight may consist of some, and have none itself."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _parts(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        else:
            yield tensor


def saved_bytes(adapted: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, Tensor]:
    """What `forward` keeps for backward beside parameters, buffers and bases; and what it returns."""
    kept: list[Tensor] = []  # held, so that no address comes twice

    def pack(t: Tensor) -> Tensor:
        # Detached: a tensor with its graph, in a list that the graph's hooks refer to, would keep both for ever.
        kept.append(t.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = forward()
    known = storages([*adapted.parameters(), *adapted.buffers(), *methods.bases(adapted)])
    return sum(size for address, size in storages(kept).items() if address not in known), result


def _peak_cuda(model: nn.Module, shape: str, size: Size, setting: Setting, device: str, name: str) -> int:
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()
    shape = shapes.SHAPES[shape]
    inputs = shape.inputs(size, device)
    before = torch.cuda.memory_allocated(device)
    if name == methods.FULL:  # trains a copy of the weights
        before += sum(storages(model.parameters()).values())
    run = step(shape, methods.adapt(name, model, setting), inputs)
    run()
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_cpu(threads: int, shape: str, size: Size, setting: Setting, device: str, name: str) -> int:
    """What lasts from step to step, by its tensors, and what a second step takes beyond, by the process's own count.

    The first step has imported, compiled and allocated what is needed once; none of it is counted.
    """
    torch.set_num_threads(threads)
    shape = shapes.SHAPES[shape]
    model = shape.build(size.depth, size.vocab, dtype=size.dtype, device=device)
    weights = storages(model.parameters())
    inputs = shape.inputs(size, device)
    adapted = methods.METHODS[name](model, setting)
    run = step(shape, adapted, inputs)
    run()
    lasting = storages([*(p for p in adapted.parameters() if p.requires_grad), *run.state(), *methods.bases(adapted)])
    before = peak.start_counting()
    run()
    above = peak.status_bytes("VmHWM") - before
    return above + sum(bytes_ for address, bytes_ in lasting.items() if address not in weights)
