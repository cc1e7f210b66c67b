"""``randlora_alpha="auto"`` in a config of PEFT's: the rule of :mod:`randlora.layers.initial`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ...layers.initial import ByRule, Shape, alpha_of, require_alpha, start
from ...layers.offload import fill
from ...model.parts import layers_with


class Found(float):
    """A number that the rule has found. PEFT's models keep the very config that they are given, and with it this: for
    the next model it is found anew. Files have a plain number.
    """


@contextmanager
def alpha_by_rule(model: nn.Module, config: Any, adapter_name: str) -> Iterator[None]:
    """Around PEFT's injection of an adapter, which divides alpha by the rank. Afterwards the config has the number.

    Layers that had an adapter of this name before, and are not among its targets now, keep what they are.

    Raises:
        TypeError: another string.
    """
    asked = config.randlora_alpha
    if not isinstance(asked, (str, Found)):
        yield
        return
    require_alpha(config.randlora_alpha)
    before = [layer.randlora_gamma[adapter_name] for layer in layers_with(model, adapter_name).values()]
    config.randlora_alpha = float(config.r)
    try:
        yield
        every = layers_with(model, adapter_name).values()
        layers = [layer for layer in every if all(layer.randlora_gamma[adapter_name] is not old for old in before)]
        shapes = [Shape(layer.in_features, layer.out_features, layer.num_bases[adapter_name]) for layer in layers]
        alpha = alpha_of(config.r, shapes)
        for layer, shape in zip(layers, shapes, strict=True):
            layer.scaling[adapter_name] = alpha / config.r
            if config.init_weights:
                fill(layer.randlora_gamma, adapter_name, start(ByRule(alpha), config.r, shape)[1])
    except BaseException:
        config.randlora_alpha = asked
        raise
    config.randlora_alpha = Found(alpha)
