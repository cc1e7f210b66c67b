"""accelerate's ``save_state`` and ``load_state`` with :class:`randlora.RandLoraModel`: adapters, not the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.restoring import restore
from ..model.model import RandLoraModel

__all__ = ["save_adapters_only"]

FOLDER = "adapters"  # in the folder of a state; of a second model "adapters_1", as accelerate numbers its files


def save_adapters_only(accelerator: Any) -> None:
    """Let ``accelerator.save_state`` write the adapters of randlora's models, in place of their whole state dicts.

    ``load_state`` reads them back into the same parameters. Other models, optimizers and the rest are accelerate's as
    before. Call it once, before or after ``prepare``. A state that was saved without it cannot be loaded with it.

    Raises:
        ValueError: where FSDP, DeepSpeed or Megatron-LM shard the models: accelerate writes those by itself, whole.
    """
    engine = getattr(accelerator.distributed_type, "value", accelerator.distributed_type)
    if str(engine) in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"accelerator.save_state writes all that {engine} shards by itself: save the adapter by "
            "model.save_pretrained(folder), and the optimizer by torch.distributed.checkpoint"
        )

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        for index, number, model in _ours(accelerator, models):
            model.save_pretrained(_place(folder, number), is_main_process=accelerator.is_main_process)
            del weights[index]

    def load(models: list[Any], folder: str) -> None:
        for index, number, model in _ours(accelerator, models):
            restore(model, _place(folder, number))
            del models[index]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _ours(accelerator: Any, models: list[Any]) -> list[tuple[int, int, RandLoraModel]]:
    """Index among all models, number among randlora's, and model; from the last, so that it can be removed."""
    plain = [accelerator.unwrap_model(model, keep_torch_compile=False) for model in models]
    ours = [(index, model) for index, model in enumerate(plain) if isinstance(model, RandLoraModel)]
    return [(index, number, model) for number, (index, model) in enumerate(ours)][::-1]


def _place(folder: str, number: int) -> Path:
    return Path(folder) / (FOLDER if number == 0 else f"{FOLDER}_{number}")
