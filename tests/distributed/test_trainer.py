"""transformers' Trainer on two processes (DDP), around models of randlora and of PEFT accelerated.

Checkpoints hold the adapter, and training goes on from them on the same and on another number of processes.
"""

import os

import pytest
import torch
from helpers.trainers import make_trainer, our_model, peft_model, train

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

MODELS = {"randlora": our_model, "peft": peft_model}
BASE_FILES = {"model.safetensors", "pytorch_model.bin"}
BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": True,
}  # fmt: skip


def run(which, folder, resume=None, dropout=0.0, **settings):
    """On every rank; the process group is that of the test."""
    trainer = make_trainer(MODELS[which](dropout=dropout), folder, **settings)
    losses, numbers = train(trainer, resume)
    wrapped = type(trainer.model_wrapped).__name__
    return losses, numbers, wrapped, trainer.args.world_size, trainer.state.best_model_checkpoint


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("which", MODELS)
def test_resuming_on_two_processes(two_ranks, tmp_path, which):
    if which == "peft":
        pytest.importorskip("peft")
    settings = {"which": which, "dropout": 0.3, **BEST}
    whole = two_ranks(run, folder=tmp_path / "whole", **settings)
    folder = tmp_path / "whole" / "checkpoint-4"
    names = set(os.listdir(folder))
    assert {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth"} <= names and not names & BASE_FILES
    again = two_ranks(run, folder=tmp_path / "again", resume=folder, **settings)
    for (losses, numbers, *where), (resumed, finally_, *_) in zip(whole, again, strict=True):
        assert where[:2] == ["DistributedDataParallel", 2] and len(losses) == 6
        assert resumed == pytest.approx({step: losses[step] for step in (5, 6)}, rel=1e-6)
        assert equal(numbers, whole[0][1]) and equal(finally_, again[0][1])
        assert not where[2].endswith("checkpoint-6")  # the best, which is loaded at the end
    best = MODELS[which]()
    from safetensors.torch import load_file

    file = load_file(os.path.join(whole[0][4], "adapter_model.safetensors"))
    assert best and file
