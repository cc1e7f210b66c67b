"""The tasks: real, offline, with room above the frozen model.

A task is what methods are compared on. It gives a pretrained model, batches of training data, a loss, a score on
held-out data, and a score of what the pretrained model could do before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import nn

from bench import ROOT

if str(ROOT / "examples") not in sys.path:
    sys.path.append(str(ROOT / "examples"))  # the demo's data and its head


class Task(Protocol):
    """Attributes and methods that :mod:`bench.quality.training` needs. One object serves many runs: it keeps no model.

    One device at a time: batches go where the last `model` went.

    Attributes:
        name: as on the command line.
        metric: what `score` gives: "accuracy", "MRR", "perplexity" ...
        larger_is_better: whether more of it is better.
        kept_metric: what `kept` gives, in the same way, with `larger_kept_is_better`.
        head: names of modules that are trained in full beside every adapter (``[]`` where the task has none).
        untuned: what the baseline is called: "best head" or "untuned".
        steps: optimizer steps of one run.
        fingerprint: SHA-256 of the data, of the pretrained model, and of the number, size and length of batches, in
            hex; rows of different ones are not compared.
    """

    name: str
    metric: str
    larger_is_better: bool
    kept_metric: str
    larger_kept_is_better: bool
    head: list[str]
    untuned: str
    steps: int
    fingerprint: str

    def model(self, device: str) -> nn.Module:
        """A fresh copy of the pretrained model, at the point from which every method starts (head already solved)."""

    def batches(self, seed: int) -> Iterator[Any]:
        """`steps` training batches on the CPU or the device of the model, in an order that `seed` decides."""

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """Scalar. `model` may be wrapped: it is only called, with keyword arguments."""

    def score(self, model: nn.Module, split: str) -> float:
        """The metric on "validation" or "test", in evaluation mode, without gradients."""

    def validation_loss(self, model: nn.Module) -> float:
        """A smooth number by which learning rates are picked (lower is better)."""

    def kept(self, model: nn.Module) -> float:
        """How well `model` still does what the pretrained one did: on data like what that was trained on."""


NAMES = ("tweets", "docstrings", "search", "language")
WIDTHS = ("language-128", "language-256", "language-512", "language-1024")  # "language" with models of other sizes


def task(name: str, *, quick: bool = False, cache: str | None = None) -> Task:
    """The task of that name, of NAMES or WIDTHS.

    `quick`: little data and few steps. `cache`: a folder for what took long to make.

    Raises FileNotFoundError, with what to install, where what the task is made of is neither on the machine nor in the
    cache; ValueError where the cache's files are damaged.
    """
    if name in WIDTHS:
        module, _, width = name.partition("-")
        return importlib.import_module(f"bench.quality.tasks.{module}").make(quick=quick, cache=cache, width=int(width))
    if name not in NAMES:
        raise ValueError(f"task must be one of {', '.join((*NAMES, *WIDTHS))}, got {name!r}")
    return importlib.import_module(f"bench.quality.tasks.{name}").make(quick=quick, cache=cache)


def prepare(folder: str, *, names: tuple[str, ...] = NAMES, minilm: bool = True) -> None:
    """Fill a cache folder, so that it serves on a machine that has neither the packages nor the network.

    `minilm`: also write the pretrained model of three tasks, in float16: 45 MB.
    """
    if minilm:
        importlib.import_module("bench.quality.tasks.minilm").write(folder)
    for name in names:
        for quick in (False, True):
            found = task(name, quick=quick, cache=folder)
            # Its model is pretrained where it is used: minutes on a GPU, hours on a CPU.
            if not name.startswith("language"):
                found.model("cpu")
