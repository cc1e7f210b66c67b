"""Training steps as CUDA graphs: small models leave a GPU idle while Python asks for their two thousand kernels.

The first batch of a shape is computed as always, at the second one the step is recorded, and from then on it is
replayed, which takes what the GPU takes. Where a step cannot be recorded (a method that waits for the device), it is
computed as always, and so are all after it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch


def leaves(batch: Any) -> list[torch.Tensor]:
    """The tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    if isinstance(batch, Mapping):
        return [leaf for value in batch.values() for leaf in leaves(value)]
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return [leaf for value in batch for leaf in leaves(value)]
    raise TypeError(f"a batch must consist of tensors, got {type(batch).__name__}")


class Recorded:
    """``run(batches)`` gives the losses. All of it, the making of batches too, happens on one stream.

    A tensor that another stream made must not be used here: whoever lets go of it there gives its memory to the next
    one while this stream has yet to read it.

    Args:
        compute: one step, without anything that changes from step to step on the host. The batch is on the device.
        after: what the host does after each step.
        device: a CUDA device.
    """

    def __init__(self, compute: Callable[[Any], torch.Tensor], after: Callable[[], Any], device: str) -> None:
        self.compute, self.after, self.device = compute, after, device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.seen: set[tuple[torch.Size, ...]] = set()
        self.graphs: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, Any, torch.Tensor]] = {}
        self.works = True

    def run(self, batches: Callable[[], Iterable[Any]]) -> list[torch.Tensor]:
        """`batches` makes them, on this stream."""
        torch.cuda.synchronize(self.device)
        losses = []
        with torch.cuda.stream(self.stream):
            for batch in batches():
                losses.append(self._step(batch))
                self.after()
        torch.cuda.synchronize(self.device)
        return losses

    def _step(self, batch: Any) -> torch.Tensor:
        shape = tuple(leaf.shape for leaf in leaves(batch))
        if self.works and shape in self.seen and shape not in self.graphs:
            self._record(shape, batch)
        if shape not in self.graphs:
            self.seen.add(shape)
            return self.compute(batch)
        graph, place, loss = self.graphs[shape]
        for here, there in zip(leaves(place), leaves(batch), strict=True):
            here.copy_(there)
        graph.replay()
        return loss.clone()

    def _record(self, shape: tuple[torch.Size, ...], batch: Any) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                loss = self.compute(batch)
        except RuntimeError as problem:
            torch.cuda.synchronize(self.device)
            print(f"steps are not recorded: {str(problem).splitlines()[0]}", file=sys.stderr)
            self.works = False
            return
        self.graphs[shape] = graph, batch, loss
