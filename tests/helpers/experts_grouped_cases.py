"""Experts whose products are all computed at once, on the CPU, as a GPU takes them."""

import contextlib

import pytest
import torch

from helpers.experts_cases import adapt, experts_of, parameters_of
from randlora.layers import experts_choice, experts_grouped

ALWAYS = 10**18, 10**18


@pytest.fixture(name="seen")
def seen_calls(monkeypatch):
    """The calls that were computed so: on the CPU, and in fp32 too, all that can be."""
    found, linear = [], experts_grouped.linear
    monkeypatch.setattr(experts_choice, "DEVICES", ("cpu",))
    monkeypatch.setattr(experts_choice, "DTYPES", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(experts_choice, "HOST", ALWAYS)
    monkeypatch.setattr(experts_choice, "LAUNCHES", 0)

    def record(*arguments):
        found.append(arguments)
        return linear(*arguments)

    monkeypatch.setattr(experts_grouped, "linear", record)
    return found


@contextlib.contextmanager
def in_turn():
    """Experts one after the other, whatever the device."""
    devices, experts_choice.DEVICES = experts_choice.DEVICES, ()
    try:
        yield
    finally:
        experts_choice.DEVICES = devices


def made(family, kind="dense", dtype=torch.float32, **settings):
    return adapt(experts_of(family, dtype, even=True), kind=kind, r=8, **settings)


def step(layer, arguments):
    """The output, and the gradients of the tokens, of their weights and of all trained parameters."""
    y = layer(*arguments)
    wanted = [t for t in (arguments[0], arguments[2], *parameters_of(layer)) if t.requires_grad]
    return y, *torch.autograd.grad(y.square().sum(), wanted)
