"""PEFT's RandLoRA tuner with bases of its own for every adapter, held once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft.tuners import randlora as peft_randlora
from peft.tuners.randlora.model import RandLoraModel as PeftRandLoraModel
from torch import nn

from ...bases import peft_prng
from ...bases.definition import bases_for_full_rank
from ...checks import require_int, require_size
from ...layers.bypassed import first_calls, forget_calls
from ...layers.fast_path import disable_fast_path, restore_fast_path
from ...layers.unmerging import check_unmerge, merged_or_not
from ...layers.update_cache import inference_cache
from ...model import ties
from ...model.injection import to_merge
from ...model.parts import adapted_layers
from ...model.training_step import at_training_step
from ...names import check_savable
from ...undo import all_or_nothing
from .alpha import alpha_by_rule
from .bases import RANK_AXIS, Bases, is_8_bit
from .conversion import convert
from .layer import AcceleratedLinear, initialise_anew, seen_where_it_computes
from .targets import check_targets, matched
from .wrappers import Trainability, activate, mixed_batch_with_wrappers, wrappers

HALF = {"peft": torch.bfloat16, "peft-fp16": torch.float16}


class AcceleratedRandLoraModel(PeftRandLoraModel):
    """What PEFT builds for a ``RandLoraConfig`` while randlora is enabled."""

    half = torch.bfloat16  # the dtype in which dense bases are drawn

    # ---- bases ----

    randlora_A: Bases
    randlora_B: Bases

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        before = getattr(model, "peft_config", None)  # a model with injected adapters: the new one's config is added
        known = dict(before) if isinstance(before, dict) else None
        try:
            super().__init__(model, *args, **kwargs)
        except BaseException:
            if before is not None and known is not None:
                before.clear()
                before.update(known)
            raise

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        # ``peft.inject_adapter_in_model`` makes a tuner every time: all adapters of a model are to be in one container.
        layers = [module for module in model.modules() if isinstance(module, peft_randlora.RandLoraLayer)]
        if not all(isinstance(layer, AcceleratedLinear) for layer in layers):
            accelerate(model)
        stores = (layers[0].randlora_A, layers[0].randlora_B) if layers else Bases._make_pair()
        if adapter_name in stores[0]:  # injected once more under one name: layers that are not targets keep what it was
            stores = Bases._make_pair()
        self.randlora_A, self.randlora_B = stores
        self.claim_bases()

    def claim_bases(self) -> None:
        for store in (self.randlora_A, self.randlora_B):
            if not store._is_owned():
                store._own(self)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.claim_bases()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel would send from rank 0 in every call: the bases, which each rank makes itself.

        It asks the module that it is put around: PEFT's model, which hands the question on, or this.
        """
        names = [f"{kind}.{adapter}" for kind in RANK_AXIS for adapter in vars(self)["_modules"].get(kind, ())]
        others = getattr(self.model, "_ddp_params_and_buffers_to_ignore", ())
        return [*others, *names, *(f"base_model.{name}" for name in names)]

    def _draw(self, config: Any, adapter_name: str, dims: tuple[int, int]) -> None:
        """The numbers that PEFT draws for this adapter if it is a model's first."""
        require_size("r", config.r)
        require_int("projection_prng_key", config.projection_prng_key, -(2**63), 2**64 - 1)
        check_targets(self, config)
        sparsity = math.sqrt(min(dims)) if config.very_sparse else 3.0 if config.sparse else None
        with torch.device("cpu"):  # PEFT's generator is there, whatever the default device is
            num_bases = bases_for_full_rank(min(dims), config.r)
            seed = config.projection_prng_key
            drawn = peft_prng.draw(max(dims), min(dims), num_bases, config.r, seed, sparsity, self.half)
        for store, tensor in zip((self.randlora_A, self.randlora_B), drawn, strict=True):
            store.persistent = config.save_projection
            store[adapter_name] = tensor

    @staticmethod
    def _check_target_module_exists(config: Any, key: str) -> Any:
        """PEFT's, whose regular expressions may come from a file: matching ends."""
        return PeftRandLoraModel._check_target_module_exists(matched(config, key), key)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's ``inject_adapter``; not only the first adapter, but every one gets bases after its own config.

        An error leaves the model without the adapter, where PEFT leaves it in the layers that it has come to.
        """
        if adapter_name in self.randlora_A:  # PEFT refuses it from 0.21 on
            raise ValueError(f"this model has an adapter named {adapter_name!r} already: delete it first")
        check_savable(adapter_name)
        config = self.peft_config[adapter_name]
        with all_or_nothing(self):
            try:
                dims = self._find_dim(config)
            except ValueError:
                if len(self.randlora_A):  # PEFT looks for a further adapter's sizes nowhere, and has another error then
                    super().inject_adapter(model, adapter_name, *args, **kwargs)
                raise
            self._draw(config, adapter_name, dims)
            with alpha_by_rule(model, config, adapter_name):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            activate(model, self.active_adapters)
            for store in (self.randlora_A, self.randlora_B):
                store._share(adapter_name)
            disable_fast_path(model)
            forget_calls(self)

    # ---- which adapters act ----

    def disable_adapter_layers(self) -> None:
        """PEFT's ``disable_adapter_layers``."""
        for wrapper in wrappers(self.model):
            Trainability.note(wrapper)
        super().disable_adapter_layers()

    def enable_adapter_layers(self) -> None:
        """PEFT's ``enable_adapter_layers``; what was frozen before :meth:`disable_adapter_layers` stays frozen."""
        with ExitStack() as stack:
            for wrapper in wrappers(self.model):
                stack.enter_context(Trainability.kept(wrapper))
            super().enable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """PEFT's ``delete_adapter``; a merged adapter is refused, as PEFT does from 0.21 on and in its words."""
        layers = [module for module in self.modules() if isinstance(module, AcceleratedLinear)]
        if adapter_name in self.peft_config and any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(
                f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first."
            )
        super().delete_adapter(adapter_name)
        activate(self.model, self.active_adapters)

    # ---- merging ----

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's ``merge_adapter``; an error leaves all layers as they were. Tied weights are untied."""
        names = self._named(adapter_names)
        to_merge(self.model, names)
        with all_or_nothing(self), merged_or_not(adapted_layers(self.model).values()):
            shared = ties.shared(self.model)
            ties.part(self.model, names)
            super().merge_adapter(adapter_names, safe_merge)
            ties.forget(self.model, shared)

    def unmerge_adapter(self) -> None:
        """PEFT's ``unmerge_adapter``; all layers are checked before the first is changed."""
        for layer in adapted_layers(self.model).values():
            if layer.merged:
                check_unmerge(layer)
        super().unmerge_adapter()

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            names = self._named(adapter_names)
            to_merge(self.model, names)
            shared = ties.before_unloading(self.model, names)
            if safe_merge:  # all layers, before the first one is unloaded
                self.merge_adapter(names, safe_merge=True)
            else:
                with all_or_nothing(self):
                    ties.part(self.model, names)
            if adapter_names is not None:  # not the copies of those that are active, which PEFT takes
                activate(self.model, names)
            adapter_names = [] if safe_merge else names
        model = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        restore_fast_path(model)
        if merge:
            ties.forget(model, shared)
        return model

    def _named(self, adapter_names: list[str] | None) -> list[str]:
        if isinstance(adapter_names, str):
            raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
        return self.active_adapters if adapter_names is None else list(adapter_names)

    def _check_new_adapter_config(self, config: Any) -> None:
        # PEFT's RandLoRA demands equal seeds and equal save_projection of all adapters, as they share their bases.
        super(PeftRandLoraModel, self)._check_new_adapter_config(config)
        if sum(other.bias != "none" for other in self.peft_config.values()) > 1:  # PEFT checks it elsewhere by version
            raise ValueError("only one adapter can train biases: set bias='none' for all others")

    # ---- state dicts ----

    # From 0.22 on PEFT's RandLoRA has hooks of its own here: they take out the copies of the bases that its layers
    # have, and put them back. Our layers have none, so the hooks of all tuners do, which other versions ask anyway.

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return cls._above(model)._get_adapter_state_dict(model, *args, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return cls._above(model)._remap_adapter_state_dict_for_load(model, *args, **kwargs)

    @classmethod
    def _above(cls, model: nn.Module) -> Any:
        """Whose hooks `model` needs: PEFT asks this class while randlora is enabled, also for models built before."""
        layers = (module for module in model.modules() if isinstance(module, peft_randlora.RandLoraLayer))
        has_copies = any(not isinstance(layer, AcceleratedLinear) for layer in layers)
        return super() if has_copies else super(PeftRandLoraModel, cls)

    # ---- layers ----

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's ``forward``. That of earlier versions goes past the hooks of the model."""
        return self.model(*args, **kwargs)

    @staticmethod
    def _create_new_module(
        config: Any, randlora_A: Bases, randlora_B: Bases, adapter_name: str, target: nn.Module, **kwargs: Any
    ) -> AcceleratedLinear:
        create = PeftRandLoraModel._create_new_module
        with seen_where_it_computes(target):
            layer = convert(create(config, randlora_A, randlora_B, adapter_name, target, **kwargs))
        initialise_anew(layer, adapter_name, config.init_weights)
        layer.follow_to_meta(adapter_name)
        return layer

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: Any) -> None:
        # PEFT moves the new layer to the device of the weight.
        with seen_where_it_computes(child.base_layer if hasattr(child, "base_layer") else child):
            super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around every call of the model: here the names of a mixed batch come in."""
        at_training_step(self)
        layers = [module for module in self.model.modules() if isinstance(module, AcceleratedLinear)]
        with mixed_batch_with_wrappers(self.model, layers, kwargs.get("adapter_names")), first_calls(self, self.model):
            yield

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped model's, inside a scope of :func:`randlora.inference_cache`. PEFT's models call it."""
        with inference_cache():
            return self.model.generate(*args, **kwargs)


# Models are printed, and scripts tell tuners apart, by the name that PEFT's class has.
AcceleratedRandLoraModel.__name__ = PeftRandLoraModel.__name__


def accelerate(model: nn.Module) -> nn.Module:
    """Convert PEFT's RandLoRA layers in `model`, and their tuner if it is there; see ``integrations.peft``."""
    own = (AcceleratedLinear, AcceleratedRandLoraModel)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft_randlora.RandLoraLayer)}
    tuners = {n: m for n, m in model.named_modules() if isinstance(m, PeftRandLoraModel)}
    if not layers:
        raise ValueError(f"this {type(model).__name__} has no RandLoRA layers of PEFT")
    for name, module in (layers | tuners).items():
        _check(name, module)
    stores = {id(layer.randlora_A): (layer.randlora_A, layer.randlora_B) for layer in layers.values()}
    with all_or_nothing(model):
        for A, B in stores.values():
            if not isinstance(A, Bases):
                Bases._make_pair(A, B)
        for tuner in tuners.values():
            # In place, as layers are: a new tuner would inject its adapters once more.
            tuner.__class__ = AcceleratedRandLoraModel
            tuner.claim_bases()
        for layer in layers.values():
            if not isinstance(layer, own):
                convert(layer)
        for A, B in stores.values():
            _narrow(A, B, [layer for layer in layers.values() if layer.randlora_A is A])
        disable_fast_path(model)
    return model


def _check(name: str, module: Any) -> None:
    # PEFT's classes for quantised layers exist only where bitsandbytes does, and so do randlora's.
    if not type(module).__module__.startswith(("peft.", f"{__package__}.")):
        raise TypeError(f"{name!r} is of a class of its own, {type(module).__qualname__}, which cannot be converted")
    if isinstance(module, AcceleratedLinear) or not isinstance(module, peft_randlora.RandLoraLayer):
        return
    if module.merged:
        raise ValueError(f"{name!r} has merged adapters: call unmerge_adapter() first")
    if isinstance(module.base_layer, peft_randlora.RandLoraLayer):
        raise ValueError(
            f"{name!r} is a RandLoRA layer around another one, as PEFT builds for a second adapter on a quantised "
            "layer: save the adapters and load them with randlora enabled"
        )
    for adapter, parameter in module.randlora_lambda.items():
        if is_8_bit(parameter):
            raise ValueError(
                f"{name!r} has adapter {adapter!r} in {parameter.dtype}, in which it cannot be computed: cast it to "
                "torch.float32"
            )
    for adapter, rank in module.r.items():
        if adapter in module.randlora_lambda and module.randlora_A[adapter].shape[0] != rank:
            raise ValueError(
                f"adapter {adapter!r} has r = {rank}, but PEFT gave it the bases of the model's first adapter, with "
                f"r = {module.randlora_A[adapter].shape[0]}: it cannot be computed"
            )


def _narrow(A: Bases, B: Bases, layers: list[AcceleratedLinear]) -> None:
    """Undo PEFT's cast of the bases to fp32 where the layers are 16-bit and no value changes."""
    dtypes = {layer.compute_dtype_and_device()[0] for layer in layers}
    if len(dtypes) != 1 or not (dtype := dtypes.pop()).is_floating_point or dtype.itemsize != 2:
        return
    for adapter in list(A):
        narrowed = [store[adapter].to(dtype) for store in (A, B)]
        if all(torch.equal(t.to(s[adapter].dtype), s[adapter]) for t, s in zip(narrowed, (A, B), strict=True)):
            A[adapter], B[adapter] = narrowed
