"""What base layers return: a tensor, or a tuple that begins with it and has more, as Megatron's layers have their bias.

An update is added to the tensor, and the rest is handed on as it is.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

Rest = tuple[Any, ...] | None  # what comes after the tensor in a tuple; None: there is no tuple


def apart(returned: Any) -> tuple[Any, Rest]:
    return (returned[0], returned[1:]) if type(returned) is tuple and returned else (returned, None)


def together(result: Tensor, rest: Rest) -> Tensor:
    """The type is what ``nn.Linear`` gives, and what nearly all layers do."""
    return result if rest is None else cast(Tensor, (result, *rest))
