"""``randlora.Linear``: a linear layer with RandLoRA adapters."""

from __future__ import annotations

from torch import Tensor, nn

from .bases import RandomBases
from .functional import add_update
from .layer import BaseTensors, RandLoraLayer


class Linear(nn.Linear, RandLoraLayer):
    """Wraps an ``nn.Linear`` and adds ``dW = alpha / r * sum_i B_i diag(lambda_i) A diag(gamma_i)`` to its weight.

    The base layer is frozen; ``randlora_lambda[adapter_name]`` and ``randlora_gamma[adapter_name]`` are trained.

    Args:
        base_layer: the ``nn.Linear`` to adapt (``weight [out, in]``).
        adapter_name: name of the first adapter; more come with :meth:`update_layer`.
        randlora_A, randlora_B: bases ``[r, 1, >= min_dim]`` and ``[>= max_dim, >= num_bases, r]``, or mappings from
            adapter name to them, such as PEFT's ``BufferDict``.
        r: rank of one base. A lower rank means more bases and more trained numbers: about
            ``min_dim * (1 + min_dim / r)`` of them.
        randlora_alpha: the update is scaled by ``randlora_alpha / r``.
        randlora_dropout: dropout probability on the update's input.
        init_weights: True: the update starts at zero. False: lambda random, gamma ``1 / max_dim``.
        bases: a :class:`randlora.RandomBases` to use. Without it and without randlora_A and randlora_B the layer takes
            its bases from a process-wide store (dense, seed 0) that grows on demand, so layers share memory.
        num_bases: number n of bases; default ``ceil(min_dim / r)``, which makes the update full-rank. Fewer are
            cheaper and give rank ``n * r``.

    Parameters are fp32 next to 16-bit weights, otherwise in the weight's dtype. The state dict holds
    ``base_layer.*``, ``randlora_lambda.<adapter>`` and ``randlora_gamma.<adapter>``; never the bases.

    Raises:
        TypeError, ValueError: for arguments that do not fit, before the base layer is touched.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        adapter_name: str = "default",
        randlora_A: BaseTensors = None,
        randlora_B: BaseTensors = None,
        r: int = 32,
        randlora_alpha: float = 640,
        randlora_dropout: float = 0.0,
        init_weights: bool = True,
        *,
        bases: RandomBases | None = None,
        num_bases: int | None = None,
    ) -> None:
        super(nn.Linear, self).__init__()  # nn.Linear's own would make a second weight
        if isinstance(base_layer, RandLoraLayer):
            raise TypeError("base_layer is adapted already: add an adapter with its update_layer()")
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"base_layer must be a torch.nn.Linear, got {type(base_layer).__name__}")
        self._init_randlora(base_layer, base_layer.in_features, base_layer.out_features)
        self.update_layer(
            adapter_name,
            randlora_A,
            randlora_B,
            r,
            randlora_alpha,
            randlora_dropout,
            init_weights,
            bases=bases,
            num_bases=num_bases,
        )
        base_layer.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (with merged adapters in it)."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in_features]`` to ``[..., out_features]`` in the dtype that the base layer gives."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result = self.base_layer(x)
        if self.disable_adapters or self.merged:
            return result
        for adapter in self._active_adapters:
            bases = self.bases[adapter]
            dropout = self.randlora_dropout[adapter]
            result = add_update(
                result,
                x,
                *bases.tensors(result.dtype, x.device),
                self.randlora_lambda[adapter],
                self.randlora_gamma[adapter],
                self.scaling[adapter] * bases.scale,
                dropout.p if self.training and isinstance(dropout, nn.Dropout) else 0.0,
            )
        return result

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self._unmerged_weight is not None:  # travels with the weight, but is no part of the state dict
            self._unmerged_weight = fn(self._unmerged_weight)
        return self

    def _get_name(self) -> str:
        return "randlora.Linear"

    def extra_repr(self) -> str:
        adapters = [
            f"{name}: r={self.r[name]}, num_bases={self.num_bases[name]}, alpha={self.randlora_alpha[name]:g}, "
            f"kind={self.bases[name].kind}"
            for name in self.randlora_lambda
        ]
        state = [f"active={self._active_adapters}"]
        if self.merged:
            state.append(f"merged={self.merged_adapters}")
        if self.disable_adapters:
            state.append("disabled")
        return f"in_features={self.in_features}, out_features={self.out_features}, {', '.join(state)}\n" + "\n".join(
            adapters
        )
