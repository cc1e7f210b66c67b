"""transformers' Trainer around models of randlora: checkpoints hold adapters, and training goes on from them."""

import json
import os

import pytest
import torch
from helpers.checkpoints import keys_of
from helpers.models import IDS, adapt, assert_unchanged, snapshot, tiny_llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from helpers.trainers import BEST_IS_FIRST, make_trainer, our_model, train  # noqa: E402

from randlora import RandLoraModel  # noqa: E402
from randlora.integrations.transformers import AdapterCheckpoints, Trainer  # noqa: E402

BASE_FILES = {"model.safetensors", "pytorch_model.bin", "config.json"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with dropout, its losses and what it has trained."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *train(make_trainer(our_model(dropout=0.3), folder))


def test_a_checkpoint_holds_the_adapter_and_not_the_base(whole):
    folder = whole[0] / "checkpoint-2"
    names = set(os.listdir(folder))
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "training_args.bin"} <= names
    assert not names & BASE_FILES
    assert all("randlora_" in key or ".norm." in key for key in keys_of(folder))
    RandLoraModel.from_pretrained(tiny_llama(), folder)


@pytest.mark.parametrize("step", [2, 4])
def test_resuming_gives_the_same_losses_bit_for_bit(whole, tmp_path, step):
    folder, losses, numbers = whole
    again, resumed = train(make_trainer(our_model(dropout=0.3), tmp_path), folder / f"checkpoint-{step}")
    assert again == {at: loss for at, loss in losses.items() if at > step} and len(again) == 6 - step
    assert numbers.keys() == resumed.keys() and all(torch.equal(numbers[name], resumed[name]) for name in numbers)


def test_the_last_checkpoint_is_found_and_old_ones_are_removed(tmp_path):
    make = lambda **settings: make_trainer(our_model(), tmp_path, save_total_limit=1, **settings)  # noqa: E731
    train(make(max_steps=4))
    assert [name for name in os.listdir(tmp_path) if name.startswith("checkpoint")] == ["checkpoint-4"]
    trainer = make()
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = make_trainer(our_model(), tmp_path, **BEST_IS_FIRST)
    parameters = [id(p) for p in trainer.model.parameters()]
    train(trainer)
    assert parameters == [id(p) for p in trainer.model.parameters()]
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = (RandLoraModel.from_pretrained(tiny_llama(), tmp_path / f"checkpoint-{step}") for step in (2, 6))
    logits = trainer.model.eval()(IDS).logits
    assert torch.equal(logits, best(IDS).logits) and not torch.equal(logits, last(IDS).logits)


def test_several_adapters(tmp_path):
    def model():
        made = our_model()
        made.add_adapter("b", {"r": 3, "target_modules": ["k_proj"]})
        made.set_adapter(["default", "b"])
        return made

    losses, numbers = train(make_trainer(model(), tmp_path))
    assert (tmp_path / "checkpoint-4" / "b" / "adapter_model.safetensors").is_file()
    again, resumed = train(make_trainer(model(), tmp_path), tmp_path / "checkpoint-4")
    assert again == {5: losses[5], 6: losses[6]}
    assert any(".b" in name for name in numbers) and all(torch.equal(numbers[n], resumed[n]) for n in numbers)


def test_tied_weights_and_the_tokenizer(tmp_path):
    """A whole state dict would hold one tensor under two names, which safetensors refuses."""

    class Tokenizer:
        def save_pretrained(self, folder):
            with open(os.path.join(folder, "tokenizer.json"), "w") as file:
                json.dump({}, file)

    trainer = make_trainer(our_model(tie_word_embeddings=True), tmp_path)
    trainer.processing_class = Tokenizer()
    trainer.save_model()
    assert {"adapter_model.safetensors", "training_args.bin", "tokenizer.json"} <= set(os.listdir(tmp_path))
    assert not any("embed" in key or "lm_head" in key for key in keys_of(tmp_path))


def test_another_adapter_is_refused(whole, tmp_path):
    trainer = make_trainer(adapt(tiny_llama(), r=5, modules_to_save=["norm"]), tmp_path)
    before = snapshot(trainer.model)
    with pytest.raises(ValueError, match="r must be 5, got 4"):
        trainer.train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))
    assert_unchanged(trainer.model, before)
    with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
        trainer.train(resume_from_checkpoint=str(tmp_path))


@pytest.mark.upstream
def test_transformers_own_trainer_writes_the_whole_state_dict(tmp_path):
    """And a run can go on from it with ours."""
    losses, _ = train(make_trainer(our_model(), tmp_path, cls=transformers.Trainer))
    assert "model.safetensors" in os.listdir(tmp_path / "checkpoint-4")
    again, _ = train(make_trainer(our_model(), tmp_path), tmp_path / "checkpoint-4")
    assert again == {5: losses[5], 6: losses[6]}


def test_other_models_are_left_to_transformers(tmp_path):
    losses, _ = train(make_trainer(tiny_llama(), tmp_path, **BEST_IS_FIRST))
    assert {"model.safetensors", "config.json"} <= set(os.listdir(tmp_path / "checkpoint-4"))
    again, _ = train(make_trainer(tiny_llama(), tmp_path), tmp_path / "checkpoint-4")
    assert again == {5: losses[5], 6: losses[6]}


def test_any_trainer_can_be_derived_from_it(tmp_path):
    class Special(transformers.Trainer):
        pass

    class Mine(AdapterCheckpoints, Special):
        pass

    make_trainer(our_model(), tmp_path, cls=Mine).save_model()
    assert (tmp_path / "adapter_config.json").is_file() and issubclass(Trainer, transformers.Trainer)
