"""TRL's trainers around :class:`randlora.RandLoraModel`.

TRL computes losses from hidden states, by an output head that it puts into the ``forward`` of a model, or of the model
that PEFT has wrapped. So a trainer is shown the wrapped model here while it is made, which is one of transformers' with
adapted layers; afterwards the adapted model takes its place.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
import trl
from torch import nn

from ..checkpoint.layout import folder_of
from ..layers.modules_to_save import ModuleToSave
from ..layers.randlora_layer import RandLoraLayer
from ..model.model import RandLoraModel
from ..model.parts import layers_with, modules_with
from .transformers import AdapterCheckpoints

__all__ = ["DPOTrainer", "GRPOTrainer", "SFTTrainer", "TrainsAdapters"]


class TrainsAdapters(AdapterCheckpoints):
    """To derive from before a trainer of TRL: ``class T(TrainsAdapters, RewardTrainer): ...``

    It trains a model of randlora, with :class:`randlora.integrations.transformers.AdapterCheckpoints`. Lambda and gamma
    stay in float32, also on a quantised model, where TRL casts the adapters of PEFT to bfloat16.

    Where the trainer wants a reference model (DPO, KTO) and none is given, the reference is the model as it is now: the
    base model, with the adapters disabled, if they have no effect yet, else with a frozen copy of the adapters, named
    ``"ref"`` as TRL's are for PEFT. So it is for GRPO and RLOO with a ``beta``. No second base model is loaded, and one
    that another trainer loads while it is made is dropped. With any other model nothing is changed.

    With ``use_vllm`` (GRPO, RLOO) vLLM gets the merged model before it generates, tensor by tensor, by the names that
    its files have (:meth:`randlora.RandLoraModel.merged_tensors`); the model that is trained does not change, and has
    one merged weight beside its own at a time. Quantised weights are sent as the numbers that they stand for, with the
    updates added.

    Raises:
        ValueError: a `peft_config` for a model that is adapted; an adapter on the output head, whose weight TRL reads
            without calling it; ``sync_ref_model``; a reference of an adapter that trains biases, which are the base's,
            or whose name is taken. With ``use_vllm``: a copy of the output head or the embeddings where the model ties
            them, which vLLM does by the model's config; 4-bit layers of bitsandbytes with vLLM in the same process,
            where TRL lets vLLM quantise, too; a TRL whose way to vLLM is not known.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        make = super().__init__
        if not isinstance(model, RandLoraModel):
            make(model, *args, **kwargs)
            return
        signature = inspect.signature(make)
        call = signature.bind(model, *args, **kwargs)
        given, base = call.arguments, model.get_base_model()
        _check(model, given)
        own = given.get("ref_model") is None  # then the reference is ours, if there is to be one
        wants = own and "ref_model" in signature.parameters
        loads = own and _loads_second_model(self, given.get("args"))
        copies = _copies_needed(model) if wants or loads else {}
        given["model"] = base
        if wants and not getattr(given.get("args"), "precompute_ref_log_probs", False):
            given["ref_model"] = _Placeholder(base.config)
        with _shown(base), _without_beta(self, given["args"]) if loads else contextlib.nullcontext():
            make(*call.args, **call.kwargs)
        self.model = self.model_wrapped = self.callback_handler.model = model
        if own and (wants or loads or getattr(self, "ref_model", None) is not None):
            self.ref_model = Reference(model, copies if wants or loads else _copies_needed(model))
        if getattr(self, "use_vllm", False):
            _send_merged(getattr(self, "vllm_generation", None), model)


class SFTTrainer(TrainsAdapters, trl.SFTTrainer):
    """TRL's ``SFTTrainer`` with :class:`TrainsAdapters`."""


class DPOTrainer(TrainsAdapters, trl.DPOTrainer):
    """TRL's ``DPOTrainer`` with :class:`TrainsAdapters`."""


class GRPOTrainer(TrainsAdapters, trl.GRPOTrainer):
    """TRL's ``GRPOTrainer`` with :class:`TrainsAdapters`."""


def _loads_second_model(trainer: Any, args: Any) -> bool:
    """Whether it is one that would load the base model anew for a reference."""
    return isinstance(trainer, (trl.GRPOTrainer, trl.RLOOTrainer)) and bool(getattr(args, "beta", 0.0))


@contextlib.contextmanager
def _without_beta(trainer: Any, args: Any) -> Iterator[None]:
    """While this lasts, such a trainer does not find the ``beta`` for which it would."""
    beta, args.beta = args.beta, 0.0
    try:
        yield
    finally:
        args.beta = trainer.beta = beta


def _send_merged(engine: Any, model: RandLoraModel) -> None:
    """Let TRL's side of vLLM send the merged model, where it would send the parameters that it finds."""
    if not callable(getattr(engine, "_iter_named_params", None)):
        raise ValueError(
            f"use_vllm: how TRL {trl.__version__} sends weights to vLLM is not known here, and by itself it would send "
            "layers without their adapters. That of TRL 1.16 is known"
        )
    engine.model = model
    engine._iter_named_params = functools.partial(model.merged_tensors, original_names=True, dequantize=True)


class _Placeholder(nn.Module):
    """Keeps TRL from loading a reference model, and gets what TRL puts into the forward of one."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


class Reference(nn.Module):
    """A model with adapters as it was when this was made, called without gradients. It has no parameters of its own.

    Args:
        copies: active adapters that have an effect -> names for frozen copies of them, which are added to `policy`;
            without any the adapters are disabled for a call.
    """

    def __init__(self, policy: RandLoraModel, copies: dict[str, str]) -> None:
        super().__init__()
        self._policy = (policy,)  # no part of this module
        self._copies = list(copies.values())
        for name, copy in copies.items():
            with tempfile.TemporaryDirectory() as folder:
                policy.save_pretrained(folder, [name], for_peft=False)
                policy.load_adapter(folder_of(folder, name), copy)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        model = self._policy[0]
        with torch.no_grad(), self._acting(model):
            return model(*args, **kwargs)

    @contextlib.contextmanager
    def _acting(self, model: RandLoraModel) -> Iterator[None]:
        if not self._copies:
            with model.disable_adapter():
                yield
            return
        active = model.active_adapters
        model.set_adapter(self._copies, inference_mode=True)
        try:
            yield
        finally:
            model.set_adapter(active)


def _check(model: RandLoraModel, given: dict[str, Any]) -> None:
    if given.get("peft_config") is not None:
        raise ValueError("peft_config must be None for a model that is adapted already")
    if getattr(given.get("args"), "sync_ref_model", False):
        raise ValueError("sync_ref_model must be False: the reference is the model itself without what it has learned")
    head = getattr(model.get_base_model(), "get_output_embeddings", lambda: None)()
    if isinstance(head, RandLoraLayer):
        raise ValueError(
            "TRL multiplies by the weight of the output head and does not call it, so that an adapter there would have "
            "no effect: leave it out of target_modules, or name it in modules_to_save"
        )
    if getattr(given.get("args"), "use_vllm", False):
        _check_vllm(model.get_base_model(), given["args"])


def _check_vllm(base: Any, args: Any) -> None:
    ends = [get() for get in (base.get_input_embeddings, base.get_output_embeddings)]
    if base.config.get_text_config().tie_word_embeddings and any(isinstance(end, ModuleToSave) for end in ends):
        raise ValueError(
            "use_vllm: the model's config ties its output head to its embeddings, so that vLLM would take one weight "
            "for both, and modules_to_save trains a copy of one of them: leave it out"
        )
    if getattr(args, "vllm_mode", None) == "colocate" and any(type(m).__name__ == "Linear4bit" for m in base.modules()):
        raise ValueError(
            "use_vllm: the model is quantised to 4 bits, for which TRL lets a vLLM in the same process quantise, too, "
            "and that takes no new weights: use vllm_mode='server' with a server of the model in 16 bits"
        )


def _copies_needed(model: RandLoraModel) -> dict[str, str]:
    """Active adapter -> name for a frozen copy; {} where none has an effect. ``ValueError`` where that cannot be."""
    active = model.active_adapters
    if not any(_acts(model, name) for name in active):
        return {}
    if biased := [name for name in active if model.peft_config[name].bias != "none"]:
        raise ValueError(
            f"the reference would need the biases that adapter {biased[0]!r} trains as they are now, and they are the "
            "base model's: give a ref_model"
        )
    names = {name: "ref" if len(active) == 1 else f"ref_{name}" for name in active}
    if taken := [name for name in names.values() if name in model.peft_config]:
        raise ValueError(
            f"the reference is to be a copy of what is active now, named {taken[0]!r}, and the model has an adapter of "
            "that name, maybe of an earlier training: call its delete_adapter() first"
        )
    return names


def _acts(model: RandLoraModel, name: str) -> bool:
    """Whether the model computes something else with this adapter than without."""
    if model.peft_config[name].bias != "none" or modules_with(model.model, name):
        return True
    layers = layers_with(model.model, name).values()
    return any(layer.randlora_lambda[name].any() and layer.randlora_gamma[name].any() for layer in layers)


@contextlib.contextmanager
def _shown(base: nn.Module) -> Iterator[None]:
    """While this lasts, transformers knows that a quantised model has adapters; their dtypes are kept."""
    flag = vars(base).get("_hf_peft_config_loaded")
    base._hf_peft_config_loaded = True  # type: ignore[assignment]
    trained = [(parameter, parameter.data) for parameter in base.parameters() if parameter.requires_grad]
    try:
        yield
    finally:
        if flag is None:
            del base._hf_peft_config_loaded
        else:
            base._hf_peft_config_loaded = flag
        for parameter, data in trained:
            if parameter.dtype != data.dtype:
                parameter.data = data.to(parameter.device)
