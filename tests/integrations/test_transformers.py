"""transformers' Trainer around models of randlora: checkpoints hold adapters, and training goes on from them."""

import functools
import json
import os
import types
import warnings

import pytest
import torch
from helpers.checkpoints import keys_of
from helpers.models import IDS, adapt, assert_unchanged, snapshot, tiny_llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from helpers.trainers import BEST_IS_FIRST, make_trainer, our_model, train  # noqa: E402

import randlora  # noqa: E402
from randlora import RandLoraModel  # noqa: E402
from randlora.integrations.transformers import AdapterCheckpoints, Trainer  # noqa: E402

CONFIG = {"r": 4, "target_modules": ["q_proj", "up_proj"]}
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


def test_a_mixin_behind_the_trainer_would_do_nothing():
    with pytest.raises(TypeError, match=r"before the trainer: class Mine\(AdapterCheckpoints, Seq2SeqTrainer\)"):
        type("Mine", (transformers.Seq2SeqTrainer, AdapterCheckpoints), {})
    with pytest.raises(TypeError, match="must come before"):
        type("Mine", (transformers.Trainer, type("Mixin", (AdapterCheckpoints,), {})), {})


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
    """It says so, and a run can go on from it with ours."""
    model = our_model()
    with pytest.warns(
        UserWarning, match=r"holds the whole base model: .*randlora\.integrations\.transformers\.Trainer"
    ):
        losses, _ = train(make_trainer(model, tmp_path, cls=transformers.Trainer))
    assert "model.safetensors" in os.listdir(tmp_path / "checkpoint-4")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again, _ = train(make_trainer(our_model(), tmp_path), tmp_path / "checkpoint-4")
        model.state_dict()
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


# ---- losses ----------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    """Of different numbers of words to predict, so that means of means are not means."""

    def __init__(self):
        generator = torch.Generator().manual_seed(2)
        self.rows = []
        for i in range(16):
            ids = torch.randint(1, 19, (8,), generator=generator)
            self.rows.append({"input_ids": ids, "labels": torch.where(torch.arange(8) < i % 7, -100, ids)})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


FIELDS = transformers.TrainingArguments.__dataclass_fields__
BY_LENGTH = {"group_by_length": True} if "group_by_length" in FIELDS else {"train_sampling_strategy": "group_by_length"}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.3},
        {"label_smoothing_factor": 0.3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"neftune_noise_alpha": 5.0},
        {"bf16": True},
        {"gradient_checkpointing": True},
        {"auto_find_batch_size": True, **BY_LENGTH},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_losses_are_those_of_the_model_without_adapters(tmp_path, monkeypatch, settings):
    """Those have no effect here, as nothing is learned."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 sets it for all that follows
    found = []
    for cls in (transformers.Trainer, Trainer):
        model = tiny_llama() if cls is transformers.Trainer else randlora.get_peft_model(tiny_llama(), CONFIG)
        trainer = make_trainer(model, tmp_path, cls=cls, learning_rate=0.0, max_steps=3, save_strategy="no", **settings)
        trainer.train_dataset = Rows()
        found.append((train(trainer)[0], trainer.model_accepts_loss_kwargs, trainer.label_names))
    (plain, *asked), (ours, *ours_asked) = found
    assert ours == pytest.approx(plain, rel=1e-3 if "bf16" in settings else 1e-6) and len(ours) == 3
    assert asked == ours_asked


def test_generating_in_evaluation(tmp_path):
    class Mine(AdapterCheckpoints, transformers.Seq2SeqTrainer):
        pass

    config = transformers.T5Config(
        vocab_size=19, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, predict_with_generate=True,
        generation_max_length=5,
    )  # fmt: skip
    data = Rows().rows[:1] * 4
    expected = transformers.Seq2SeqTrainer(model, arguments).predict(data)
    adapted = randlora.get_peft_model(model, {"r": 4, "target_modules": ["q"]})
    found = Mine(adapted, arguments).predict(data)
    assert (found.predictions == expected.predictions).all() and found.metrics["test_loss"] == pytest.approx(
        expected.metrics["test_loss"]
    )


def test_a_quantised_model(tmp_path):
    """transformers trains one only if it has adapters."""
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    quantised = transformers.BitsAndBytesConfig(load_in_4bit=True)
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantised, device_map={"": "cpu"}
    )
    with pytest.raises(ValueError, match="purely quantized"):
        make_trainer(base, tmp_path)
    model = randlora.get_peft_model(base, {"r": 4, "target_modules": ["q_proj"]})
    losses, _ = train(make_trainer(model, tmp_path, max_steps=2))
    assert len(losses) == 2 and "adapter_config.json" in os.listdir(tmp_path / "checkpoint-2")


# ---- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["end", "every_save"])
def test_pushing_to_the_hub(tmp_path, monkeypatch, strategy):
    hub = pytest.importorskip("huggingface_hub")
    folders = []

    def upload_folder(self, *, folder_path, ignore_patterns=(), run_as_future=False, **options):
        folders.append({name: data(folder_path) if name == "README.md" else None for name in os.listdir(folder_path)})
        return types.SimpleNamespace(done=lambda: True, is_done=lambda: True, result=lambda: None)

    def data(folder):
        card = hub.ModelCard.load(os.path.join(folder, "README.md"))
        return card.data.to_dict() | {"text": card.text}

    create = lambda self, repo_id, **_: hub.RepoUrl(f"https://huggingface.co/{repo_id}")  # noqa: E731
    for name, function in (("create_repo", create), ("upload_folder", upload_folder)):
        monkeypatch.setattr(hub.HfApi, name, function)
        if hasattr(transformers.trainer, name):  # transformers 4
            monkeypatch.setattr(transformers.trainer, name, functools.partial(function, None))
    model = our_model(num_bases=2) if strategy == "end" else our_model()
    model.model.name_or_path = model.model.config._name_or_path = "some-user/base"
    model.peft_config["default"].base_model_name_or_path = "some-user/base"
    model.add_adapter("b", {"r": 3, "target_modules": ["k_proj"]})
    settings = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_strategy": strategy, "max_steps": 2}
    trainer = make_trainer(model, tmp_path, **settings)
    train(trainer)
    trainer.push_to_hub(tags="mine")
    assert len(folders) == (1 if strategy == "end" else 2)
    for files in folders:
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "b"} <= set(files)
        assert "model.safetensors" not in files
        card = files["README.md"]
        assert card["base_model"] == "some-user/base" and card["library_name"] == "randlora"  # for b is not PEFT's
        assert 'snapshot_download("me/mine")' in card["text"]
    assert "mine" in card["tags"] and "some-user/base" in card["text"]
