"""Which layers a config of PEFT's means, and whether they can be adapted: looked at before anything is changed."""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners import randlora as peft_randlora
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn

from ...expressions import Expression
from ...layers import offload
from ...layers.base_layer import check
from ...layers.linears import is_ordinary, is_transposed, require_linear


def matched(config: Any, key: str) -> Any:
    """`config` as it is for the module `key`, with lists in place of regular expressions: these are matched here.

    Raises:
        ValueError: an expression that takes too long, as :class:`randlora.expressions.Expression` has it.
    """
    if isinstance(config.target_modules, str):
        found = Expression("target_modules", config.target_modules).fullmatch(key)
        config = copy.copy(config)
        config.target_modules = [key] if found else []
        config.layers_to_transform = config.layers_pattern = None  # PEFT looks at them for lists only
    elif patterns := config.layers_pattern:
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            Expression("layers_pattern", pattern, rf".*\.{pattern}\.(\d+)\.").match(key)
    return config


def check_targets(tuner: Any, config: Any) -> None:
    """Raises for what cannot be adapted."""
    config = tuner._prepare_adapter_config(config, tuner.get_model_config(tuner.model))
    config = _maybe_include_all_linear_layers(config, tuner.model)
    modules: dict[str, nn.Module] = dict(tuner.model.named_modules())
    targets = [name for name in modules if tuner._check_target_module_exists(config, name)]
    biased = {"none": (), "all": modules}.get(config.bias, targets)
    with_bias = [modules[name] for name in biased if isinstance(getattr(modules[name], "bias", None), nn.Parameter)]
    endings = tuple(config.modules_to_save or ())  # as PEFT looks for them
    saved = [name for name in modules if endings and name.endswith(endings)]
    offload.check_targets(tuner.model, targets, *(() if config.inference_mode else (with_bias, saved)))
    for name in targets:
        module = modules[name]
        if isinstance(module, peft_randlora.RandLoraLayer) or not is_ordinary(module):
            continue  # what is no linear layer, PEFT refuses
        try:
            check(module, *require_linear(module), is_transposed(module))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name!r} cannot be adapted: {error}") from error
