"""HQQ: ``HQQLinear``, whose weight is the codes ``W_q`` and the scales and settings in ``meta``."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from .kind import Kind


class Hqq(Kind):
    has_gradient = False
    parts = ("W_q", "meta")

    def recognises(self, base_layer: Any, held: Any) -> bool:
        module = sys.modules.get("hqq.core.quantize")
        return module is not None and isinstance(base_layer, module.HQQLinear)

    def name(self, held: Any) -> str:
        return f"HQQ's {held['meta']['nbits']}-bit"

    def dequantize(self, base_layer: Any, held: Any) -> Tensor:
        if held["W_q"] is None or held["meta"] is None:
            raise ValueError("the base layer, HQQ's HQQLinear, has not quantised its weight yet: call its initialize()")
        # Its method looks at nothing else, and these need not be the layer's present ones.
        return type(base_layer).dequantize(SimpleNamespace(ready=True, **held))

    def requantize(self, base_layer: Any, held: Any, weight: Tensor) -> dict[str, Any]:
        config = base_layer.quant_config
        if not config:
            raise ValueError(
                "the base layer, HQQ's HQQLinear, does not know how it was quantised: it has no quant_config"
            )
        twin = type(base_layer)(
            None,
            {**config, "offload_meta": base_layer.offload_meta},
            compute_dtype=base_layer.compute_dtype,
            device=held["W_q"].device,
        )
        twin.quantize(weight, **config)
        return self.held(twin)
