"""TRL's trainers around models of randlora."""

import os

import pytest
import torch
from helpers.checkpoints import keys_of
from helpers.models import IDS, add, tiny_llama
from helpers.trainers import SETTINGS, our_model, tokenizer, train

import randlora

transformers = pytest.importorskip("transformers")
datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")

from randlora.integrations.trl import DPOTrainer, SFTTrainer, TrainsAdapters  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # TRL calls what transformers renames
TEXTS = {"text": ["a b c d", "b c d e", "e f g h", "a c e g"] * 2}
PAIRS = {"prompt": ["a b", "c d"] * 4, "chosen": ["e f", "g h i"] * 4, "rejected": ["i j k", "a a"] * 4}
ARGUMENTS = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 0.02, "logging_steps": 1, "report_to": [],
    "use_cpu": True, "save_steps": 2, "disable_tqdm": True, "bf16": False, "max_length": 8,
}  # fmt: skip


def make(cls, model, folder, ref_model=None, **settings):
    data, config = (TEXTS, trl.SFTConfig) if issubclass(cls, trl.SFTTrainer) else (PAIRS, trl.DPOConfig)
    given = {} if ref_model is None else {"ref_model": ref_model}
    return cls(
        model=model, args=config(output_dir=str(folder), **ARGUMENTS | settings), processing_class=tokenizer(),
        train_dataset=datasets.Dataset.from_dict(data), **given,
    )  # fmt: skip


def fresh(**settings):
    """Without an effect yet."""
    return randlora.get_peft_model(tiny_llama(), {**SETTINGS, "modules_to_save": None, **settings})


def alone(model):
    return model.merge_and_unload()


# ---- SFT -------------------------------------------------------------------------------------------------------------


def test_sft(tmp_path):
    model = our_model()
    trainer = make(SFTTrainer, model, tmp_path)
    losses, numbers = train(trainer)
    assert trainer.model is model and len(losses) == 4
    folder = tmp_path / "checkpoint-2"
    assert "adapter_config.json" in os.listdir(folder) and "model.safetensors" not in os.listdir(folder)
    assert all("randlora_" in key or ".norm." in key for key in keys_of(folder))
    again, resumed = train(make(SFTTrainer, our_model(), tmp_path / "again"), folder)
    assert again == {3: losses[3], 4: losses[4]} and all(torch.equal(numbers[n], resumed[n]) for n in numbers)
    loaded = randlora.RandLoraModel.from_pretrained(tiny_llama(), tmp_path / "checkpoint-4")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    trainer.save_model()
    trainer.create_model_card("mine")
    card = (tmp_path / "README.md").read_text()
    assert (
        "library_name: randlora" in card and "randlora.RandLoraModel.from_pretrained(base" in card and "- sft" in card
    )
    # The first loss is that of TRL's own trainer around the same model without adapters.
    plain, _ = train(make(trl.SFTTrainer, alone(our_model()), tmp_path / "plain", max_steps=1))
    assert losses[1] == pytest.approx(plain[1], rel=1e-5)


def test_sft_trains_an_output_head_that_is_saved(tmp_path):
    model = our_model(tie_word_embeddings=True)
    model = randlora.get_peft_model(
        model.unload(), {"r": 3, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    )
    before = model.model.lm_head.modules_to_save["default"].weight.detach().clone()
    train(make(SFTTrainer, model, tmp_path, max_steps=2))
    after = model.model.lm_head.modules_to_save["default"].weight
    assert not torch.equal(before, after) and torch.equal(before, model.model.model.embed_tokens.weight)
    loaded = randlora.RandLoraModel.from_pretrained(tiny_llama(tie_word_embeddings=True), tmp_path / "checkpoint-2")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_what_trl_cannot_do(tmp_path):
    head = randlora.get_peft_model(tiny_llama(), {"r": 3, "target_modules": ["lm_head"]})
    with pytest.raises(ValueError, match="output head and does not call it"):
        make(SFTTrainer, head, tmp_path)
    with pytest.raises(ValueError, match="sync_ref_model must be False"):
        make(DPOTrainer, fresh(), tmp_path, sync_ref_model=True)
    with pytest.raises(ValueError, match="biases that adapter 'default' trains"):
        make(DPOTrainer, fresh(bias="randlora_only"), tmp_path)
    with pytest.raises(ValueError, match="peft_config must be None"):
        SFTTrainer(fresh(), peft_config=object())
    with pytest.raises(ValueError, match=r"an adapter of that name, .* delete_adapter"):
        make(DPOTrainer, add(our_model(), "ref", 3), tmp_path)


def test_a_quantised_model_keeps_the_precision_of_its_adapters(tmp_path):
    pytest.importorskip("bitsandbytes")
    tiny_llama(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    base = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=transformers.BitsAndBytesConfig(load_in_4bit=True),
        device_map={"": "cpu"},
    )
    model = randlora.get_peft_model(base, {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    losses, numbers = train(make(SFTTrainer, model, tmp_path, max_steps=2))
    assert all(number.dtype == torch.float32 for number in numbers.values()) and losses[2] != losses[1]
    assert not base._hf_peft_config_loaded


def test_other_models_are_left_to_trl(tmp_path):
    train(make(SFTTrainer, tiny_llama(), tmp_path, max_steps=2))
    assert {"model.safetensors", "config.json"} <= set(os.listdir(tmp_path / "checkpoint-2"))


# ---- DPO -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_dpo_compares_with_the_model_as_it_was(tmp_path, start):
    """As with a reference model in memory, which the test gives; without one no second base model is made."""
    begin = fresh if start == "fresh" else our_model
    expected, numbers = train(make(DPOTrainer, begin(), tmp_path / "given", ref_model=alone(begin())))
    model = begin()
    trainer = make(DPOTrainer, model, tmp_path / "own")
    losses, trained = train(trainer)
    assert losses == pytest.approx(expected, rel=1e-5) and not list(trainer.ref_model.parameters())
    assert (
        model.active_adapters == ["default"] and list(model.peft_config) == ["default", "ref"][: 1 + (start != "fresh")]
    )
    for name, number in trained.items():
        torch.testing.assert_close(number, numbers[name], rtol=1e-4, atol=1e-6)
    folder = tmp_path / "own" / "checkpoint-2"
    assert "model.safetensors" not in os.listdir(folder) and all("lm_head" not in key for key in keys_of(folder))
    if start == "trained":
        again, resumed = train(make(DPOTrainer, begin(), tmp_path / "again"), folder)
        assert again == {3: losses[3], 4: losses[4]} and all(torch.equal(trained[n], resumed[n]) for n in trained)
        before, _ = train(make(DPOTrainer, begin(), tmp_path / "b", precompute_ref_log_probs=True, max_steps=2))
        assert before == pytest.approx({1: losses[1], 2: losses[2]}, rel=1e-5)


def test_dpo_with_several_adapters(tmp_path):
    def several():
        model = add(our_model(), "b", 3, target_modules=["k_proj"])
        model.set_adapter(["default", "b"])
        return model

    expected, _ = train(make(DPOTrainer, several(), tmp_path, ref_model=alone(several()), max_steps=2))
    model = several()
    losses, _ = train(make(DPOTrainer, model, tmp_path, max_steps=2))
    assert losses == pytest.approx(expected, rel=1e-5)
    assert model.active_adapters == ["default", "b"] and set(model.peft_config) == {
        "default",
        "b",
        "ref_default",
        "ref_b",
    }


def test_any_trainer_can_be_derived_from_it(tmp_path):
    class Reward(TrainsAdapters, trl.RewardTrainer):
        pass

    config = tiny_llama().config
    config.num_labels = 1
    model = transformers.LlamaForSequenceClassification(config)
    model = randlora.get_peft_model(model, {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["score"]})
    arguments = trl.RewardConfig(output_dir=str(tmp_path), **ARGUMENTS | {"max_steps": 2})
    data = datasets.Dataset.from_dict(PAIRS)
    train(Reward(model, arguments, train_dataset=data, processing_class=tokenizer()))
    assert any("score" in key for key in keys_of(tmp_path / "checkpoint-2"))
