"""transformers' Trainer on two processes (DDP), around models of randlora and of PEFT accelerated.

Checkpoints hold the adapter, and training goes on from them on the same and on another number of processes.
"""

import os

import pytest
import torch
from helpers.accelerated import environment, on_cpus
from helpers.checkpoints import WEIGHTS, keys_of
from helpers.trainers import BEST_IS_FIRST, make_trainer, our_model, peft_model, train
from safetensors.torch import load_file

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

MODELS = {"randlora": our_model, "peft": peft_model}


@pytest.fixture(params=MODELS)
def which(request):
    return pytest.importorskip(request.param) and request.param


def run(which, folder, resume=None, dropout=0.0, told=None, **settings):
    """On every rank, and in the process of the test."""
    if told is not None:
        with on_cpus(told):
            return run(which, folder, resume, dropout, **settings)
    trainer = make_trainer(MODELS[which](dropout=dropout), folder, **settings)
    losses, numbers = train(trainer, resume)
    return losses, numbers, type(trainer.model_wrapped).__name__


def assert_equal(first, second, **tolerance):
    assert first.keys() == second.keys() and first
    for name, number in first.items():
        torch.testing.assert_close(number, second[name], **tolerance or {"rtol": 0, "atol": 0})


def test_resuming_on_as_many_processes(two_ranks, tmp_path, which):
    settings = {"which": which, "dropout": 0.3}
    first, second = two_ranks(run, folder=tmp_path / "whole", **settings)
    assert first[2] == "DistributedDataParallel" and len(first[0]) == 6 and first[0] == second[0]
    assert_equal(first[1], second[1])
    folder = tmp_path / "whole" / "checkpoint-4"
    names = set(os.listdir(folder))
    assert {WEIGHTS, "rng_state_0.pth", "rng_state_1.pth"} <= names
    assert not names & {"model.safetensors", "pytorch_model.bin"}
    assert all("randlora_" in key or "norm." in key for key in keys_of(folder))
    for resumed in two_ranks(run, folder=tmp_path / "again", resume=folder, **settings):
        assert resumed[0] == pytest.approx({5: first[0][5], 6: first[0][6]}, rel=1e-6)
        assert_equal(resumed[1], first[1], rtol=1e-5, atol=1e-6)


def test_resuming_on_another_number_of_processes(two_ranks, tmp_path, which):
    """With as many rows in a step, losses are those of the run that went through."""
    both = {"which": which, "per_device_train_batch_size": 4}
    alone = {"which": which, "per_device_train_batch_size": 8}
    whole, numbers, _ = run(folder=tmp_path / "one", **alone)
    first, _ = two_ranks(run, folder=tmp_path / "two", **both)
    assert first[0] == pytest.approx(whole, rel=1e-5)
    expected = {5: whole[5], 6: whole[6]}
    grown, _ = two_ranks(run, folder=tmp_path / "grown", resume=tmp_path / "one" / "checkpoint-4", **both)
    shrunk = run(folder=tmp_path / "shrunk", resume=tmp_path / "two" / "checkpoint-4", **alone)
    for losses, trained, _ in (grown, shrunk):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert_equal(trained, numbers, rtol=1e-3, atol=1e-5)


def assert_of_checkpoint(which, numbers, folder):
    """`numbers` are those that the files in `folder` hold."""
    saved = load_file(folder / WEIGHTS)
    for name, number in numbers.items():
        key = name.replace(".modules_to_save.default", "").removesuffix(".default")
        assert torch.equal(number, saved.pop(f"base_model.{key}" if which == "randlora" else key)), name
    assert not saved


def test_the_best_model_is_loaded_at_the_end(two_ranks, tmp_path, which):
    for _, numbers, _ in two_ranks(run, which=which, folder=tmp_path, **BEST_IS_FIRST):
        best, last = (load_file(tmp_path / f"checkpoint-{step}" / WEIGHTS) for step in (2, 6))
        assert best.keys() == last.keys() and not any(torch.equal(best[key], last[key]) for key in best)
        assert_of_checkpoint(which, numbers, tmp_path / "checkpoint-2")


@pytest.mark.parametrize(
    "which, state_dict_type", [("randlora", "FULL"), ("randlora", "SHARDED"), ("peft", "FULL")], indirect=["which"]
)
def test_fsdp2(two_ranks, tmp_path, which, state_dict_type):
    """As on one process, checkpoints hold the adapter alone, and training goes on from them."""
    told = environment("fsdp2.yaml") | {"FSDP_STATE_DICT_TYPE": f"{state_dict_type}_STATE_DICT"}
    whole, numbers, _ = run(which, tmp_path / "one", per_device_train_batch_size=8)
    folder = tmp_path / "two" / "checkpoint-4"
    for losses, trained, wrapped in two_ranks(run, which=which, folder=folder.parent, told=told, **BEST_IS_FIRST):
        assert losses == pytest.approx(whole, rel=1e-5) and wrapped.startswith("FSDP")
        assert_of_checkpoint(which, trained, folder.parent / "checkpoint-2")
    keys = set(keys_of(folder))
    if which == "peft":  # transformers writes what is trained once more
        keys |= torch.load(folder / "pytorch_model_fsdp.bin").keys()
    else:
        assert not any(name.startswith("pytorch_model") for name in os.listdir(folder))
    assert all("randlora_" in key or "norm." in key for key in keys)
    for losses, trained, _ in two_ranks(run, which=which, folder=tmp_path / "again", resume=folder, told=told):
        assert losses == pytest.approx({5: whole[5], 6: whole[6]}, rel=1e-5)
        assert_equal(trained, numbers, rtol=1e-3, atol=1e-5)
