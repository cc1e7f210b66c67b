"""Ways to adapt a model, under the names that tables and pictures use.

``METHODS[name](model, setting)`` changes or wraps `model`; :func:`adapt` does it to a copy that shares the frozen
weights, so that a dozen methods on one model fit into memory side by side. The questions about whole models
(``model.py``, ``generate.py``, ``memory.py``) all take their methods from here.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench import plain
from bench import plain_transforms as transforms

if TYPE_CHECKING:
    from randlora import RandomBases

FROZEN, FULL = "frozen", "full fine-tuning"
NOT_KEPT = "randlora, bases not kept"
# The same bases and the same parameters give the same numbers here.
FAMILY = ("PEFT RandLoRA", "PEFT RandLoRA, 16-bit", "PEFT RandLoRA, accelerated", "PyTorch", "PyTorch, compiled",
          "randlora", NOT_KEPT)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What an adapter is made with.

    Args:
        targets: linear layers by name, or by the last parts of their names, or ``"all-linear"``: all but the head.
        rank: of LoRA, DoRA, and of one base of RandLoRA.
        dtype: of the model.
        vera_rank: VeRA is meant for higher ranks: 256 is PEFT's default and the RandLoRA paper's choice.
    """

    targets: Sequence[str] | str
    rank: int = 32
    dtype: torch.dtype = torch.float32
    vera_rank: int = 256

    @property
    def alpha(self) -> int:
        return 2 * self.rank


def layers(model: nn.Module, setting: Setting) -> dict[str, nn.Linear]:
    """Name -> target. Raises ``ValueError`` if there is none."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if isinstance(setting.targets, str):
        if setting.targets != "all-linear":
            raise ValueError(f"targets must be a list of names or 'all-linear', got {setting.targets!r}")
        found = {name: module for name, module in linear.items() if module is not head}
    else:
        ends = tuple(f".{target}" for target in setting.targets)
        found = {name: module for name, module in linear.items() if f".{name}".endswith(ends)}
    if not found:
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise ValueError(f"{setting.targets} matches no linear layer of this model; it has: {known}")
    return found


# ---- methods ----


def frozen(model: nn.Module, setting: Setting) -> nn.Module:
    return model.requires_grad_(False)


def full(model: nn.Module, setting: Setting) -> nn.Module:
    return model.requires_grad_(True)


def peft(model: nn.Module, setting: Setting, config: str, fp32_adapter: bool = True, **fields) -> nn.Module:
    """PEFT as it comes; it keeps adapters in fp32 on a 16-bit model unless told otherwise."""
    import peft as package

    if not fp32_adapter and setting.dtype.itemsize > 2:
        raise ValueError(f"16-bit adapters are for 16-bit models, this one is {setting.dtype}")
    fields = {"r": setting.rank, "target_modules": list(layers(model, setting))} | fields
    with warnings.catch_warnings():  # of every config: that save_projection makes large files
        warnings.simplefilter("ignore")
        return package.get_peft_model(model, getattr(package, config)(**fields), autocast_adapter_dtype=fp32_adapter)


def lora(model: nn.Module, setting: Setting, fp32_adapter: bool = True, **fields) -> nn.Module:
    return peft(model, setting, "LoraConfig", fp32_adapter, lora_alpha=setting.alpha, **fields)


def vera(model: nn.Module, setting: Setting) -> nn.Module:
    return peft(model, setting, "VeraConfig", r=setting.vera_rank)


def peft_randlora(model: nn.Module, setting: Setting, fp32_adapter: bool = True) -> nn.Module:
    return peft(model, setting, "RandLoraConfig", fp32_adapter, randlora_alpha=setting.alpha)


def accelerated(model: nn.Module, setting: Setting) -> nn.Module:
    """PEFT's RandLoRA, computed by randlora: this model alone."""
    import randlora.integrations.peft as integration

    with integration.enable():
        return peft_randlora(model, setting)


def plain_pytorch(
    model: nn.Module, setting: Setting, function: str = "rebuilding", strategy: str | None = None
) -> nn.Module:
    """See :class:`bench.plain.Linear`."""
    import randlora
    from randlora.bases.definition import bases_for_full_rank

    found = layers(model.requires_grad_(False), setting)
    sizes = [sorted(layer.weight.shape) for layer in found.values()]
    device = next(iter(found.values())).weight.device
    bases = randlora.RandomBases(max(M for _, M in sizes), max(m for m, _ in sizes), setting.rank)
    A, B = bases.tensors(setting.dtype, device)
    flat = {}  # layers of one size share their matrix
    for name, layer in found.items():
        m, M = sorted(layer.weight.shape)
        if (m, M) not in flat:
            flat[m, M] = B[:M, : bases_for_full_rank(m, setting.rank)].flatten(1)
        adapted = plain.Linear(layer, A, flat[m, M], setting.alpha / setting.rank, function, strategy)
        model.set_submodule(name, adapted)
    return model


def plain_transforms(model: nn.Module, setting: Setting, fast: bool = False) -> nn.Module:
    """Hadamard bases: see :class:`bench.plain_transforms.Linear`. `fast`: compiled."""
    import randlora
    from randlora.bases.definition import bases_for_full_rank

    found = layers(model.requires_grad_(False), setting)
    sizes = [sorted(layer.weight.shape) for layer in found.values()]
    bases = randlora.RandomBases(max(M for _, M in sizes), max(m for m, _ in sizes), setting.rank, "hadamard")
    for name, layer in found.items():
        A, B = bases.tensors(setting.dtype, layer.weight.device)
        m, M = sorted(layer.weight.shape)
        own = A[:, :, :m], B[:M, : bases_for_full_rank(m, setting.rank)], bases.group_width
        model.set_submodule(name, transforms.Linear(layer, *own, setting.alpha / setting.rank, fast))
    return model


def own(
    model: nn.Module,
    setting: Setting,
    kind: str = "dense",
    strategy: str = "auto",
    sparsity: float | None = None,
    keep: bool = True,
) -> nn.Module:
    """`keep`: False makes dense bases anew in every pass."""
    import randlora

    config = randlora.RandLoraConfig(
        r=setting.rank, randlora_alpha=setting.alpha, kind=kind, strategy=strategy, sparsity=sparsity,
        target_modules=list(layers(model, setting)),
    )  # fmt: skip
    adapted = randlora.get_peft_model(model, config)
    if not keep:
        _own_bases(adapted)
        randlora.keep_bases(adapted, False)
    return adapted


def _own_bases(adapted: nn.Module) -> None:
    """The same bases in a store that no other model has: a process shares them, and what is beside this keeps them."""
    apart: dict[int, RandomBases] = {}
    for pair in pairs(adapted):
        shared = pair.layer.bases["default"]
        pair.layer.bases["default"] = apart.setdefault(id(shared), shared.to(shared.device))


METHODS: dict[str, Callable[[nn.Module, Setting], nn.Module]] = {
    FROZEN: frozen,
    FULL: full,
    "PEFT LoRA": lora,
    "PEFT LoRA, 16-bit": functools.partial(lora, fp32_adapter=False),
    "PEFT DoRA": functools.partial(lora, use_dora=True),
    "PEFT VeRA": vera,
    "PEFT RandLoRA": peft_randlora,
    "PEFT RandLoRA, 16-bit": functools.partial(peft_randlora, fp32_adapter=False),
    "PEFT RandLoRA, accelerated": accelerated,
    "PyTorch": plain_pytorch,
    "PyTorch, compiled": functools.partial(plain_pytorch, function="compiled"),
    "randlora": own,
    NOT_KEPT: functools.partial(own, keep=False),
    "randlora sparse": functools.partial(own, kind="sparse"),
    "randlora very_sparse": functools.partial(own, kind="very_sparse"),
    "randlora hadamard": functools.partial(own, kind="hadamard"),
}


def suitable(dtype: torch.dtype) -> list[str]:
    """The methods that make sense on a model of this dtype."""
    return [name for name in METHODS if dtype.itemsize <= 2 or not name.endswith("16-bit")]


# ---- copies ----


def twin(model: nn.Module, own_weights: bool = False) -> nn.Module:
    """A copy of `model` whose parameters and buffers are the same tensors, unless it is to have its own."""
    shared = () if own_weights else (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(t): t for t in shared})


def adapt(name: str, model: nn.Module, setting: Setting, own_weights: bool = False) -> nn.Module:
    """METHODS[name] on a copy of `model`, which is left as it is but frozen.

    What trains or changes the weights gets its own: full fine-tuning, and with `own_weights` merging.
    """
    model.requires_grad_(False)
    return METHODS[name](twin(model, own_weights or name == FULL), setting)


# ---- what is inside ----


@dataclass(frozen=True)
class Pair:
    """Parameters of one layer of a RandLoRA model; ``scaling * sum_i B_i diag(lam_i) A diag(gamma_i)`` is its dW."""

    name: str  # of the layer in the model without adapters
    layer: nn.Module
    lam: nn.Parameter
    gamma: nn.Parameter
    scaling: float


def inner(adapted: nn.Module) -> nn.Module:
    """The adapted model without what a library wraps around it: its layers have the names they had."""
    return adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted


def pairs(adapted: nn.Module) -> list[Pair]:
    """Of whatever RandLoRA model this is, in the order of the layers; empty for other methods."""
    found = []
    for name, module in inner(adapted).named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "randlora_lambda"):
            lam, gamma, scaling = module.randlora_lambda, module.randlora_gamma, module.scaling
            if not isinstance(lam, nn.Parameter):  # a dict of adapters
                lam, gamma, scaling = lam["default"], gamma["default"], scaling["default"]
            found.append(Pair(name, module, lam, gamma, scaling))
    return found


@contextlib.contextmanager
def random_parameters(adapted: nn.Module, size: float = 0.5, seed: int = 1):
    """Random lambda and gamma inside, what was there before afterwards; the same ones in every RandLoRA model.

    At the standard initialisation the update is zero, and a wrong one would not show.

    Args:
        size: of the update, relative to the layer's weight (root mean square), for bases of unit variance.
    """
    before = [(pair, pair.lam.detach().clone(), pair.gamma.detach().clone()) for pair in pairs(adapted)]
    set_random(adapted, size, seed)
    try:
        yield adapted
    finally:
        with torch.no_grad():
            for pair, lam, gamma in before:
                pair.lam.copy_(lam)
                pair.gamma.copy_(gamma)


@torch.no_grad()
def set_random(adapted: nn.Module, size: float = 0.5, seed: int = 1) -> None:
    """As :func:`random_parameters`, for good."""
    for i, pair in enumerate(pairs(adapted)):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        weight = pair.layer.base_layer.weight
        # An element of dW is a sum of r * n products, of which B and A have unit variance.
        deviation = size * weight.float().square().mean().sqrt().item() / (pair.scaling * pair.lam.numel() ** 0.5)
        pair.lam.copy_(torch.randn(pair.lam.shape, generator=generator))
        pair.gamma.copy_(torch.randn(pair.gamma.shape, generator=generator) * deviation)


@torch.no_grad()
def set_bases(adapted: nn.Module) -> None:
    """Give PEFT's RandLoRA the bases that the others of the family have, which are the leading part of larger ones."""
    import randlora

    stores = adapted.base_model.randlora_A, adapted.base_model.randlora_B
    (r, _, m), (M, n, _) = (store["default"].shape for store in stores)
    drawn = randlora.RandomBases(M, m, r, num_bases=n).draw(torch.float32, stores[0]["default"].device)
    for store, values in zip(stores, drawn, strict=True):
        store["default"] = values.to(store["default"].dtype)


def bases(adapted: nn.Module) -> list[Tensor]:
    """The tensors in memory that are bases, of any method; randlora's come into being with the first call."""
    found = [
        tensor
        for name, tensor in adapted.named_buffers(remove_duplicate=False)
        if {"randlora_A", "randlora_B", "vera_A", "vera_B", "A", "B2"} & set(name.split(".")[-2:])
    ]
    for pair in pairs(adapted):
        for held in getattr(pair.layer, "bases", {}).values():
            found += [tensor for both in held.copies.dense.values() for tensor in both]
            found += [tensor for form, _ in held.copies.packed.values() for tensor in form.tensors]
    return list({tensor.untyped_storage().data_ptr(): tensor for tensor in found}.values())
