"""Training with transformers' Trainer, TRL's SFTTrainer, gradient checkpointing and torch.compile."""

import copy
import os

import pytest
import torch
from helpers.common import over

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from helpers.peft_models import adapt, both, config, layers, llama, logits, tokens  # noqa: E402

import randlora.integrations.peft as integration  # noqa: E402

TARGETS = "q_proj", "k_proj", "v_proj", "down_proj"


class Losses(transformers.TrainerCallback):
    def __init__(self):
        self.values = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.values += [logs["loss"]] if "loss" in logs else []


SETTINGS = {
    "max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
    "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_nan_inf_filter": False,
}  # fmt: skip


# As transformers 5 has it by itself. The other way needs enable_input_require_grads() around any frozen embedding.
NOT_REENTRANT = {"gradient_checkpointing_kwargs": {"use_reentrant": False}}


def train(model, folder, **settings):
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
    arguments = transformers.TrainingArguments(output_dir=str(folder), **SETTINGS | settings)
    losses = Losses()
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[losses]).train()
    return torch.tensor(losses.values)


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, **NOT_REENTRANT}],
    ids=["plain", "checkpointing"],
)
def test_trainer(settings, tmp_path):
    """The losses of PEFT's own run, step by step, and a checkpoint that PEFT loads."""
    models = [adapt(llama(), config(*TARGETS), accelerated) for accelerated in (False, True)]
    runs = [train(model, tmp_path, **settings) for model in models]
    assert len(runs[0]) == 8 and runs[0][0] - runs[0][-1] > 0.3
    torch.testing.assert_close(*runs, rtol=0, atol=2e-4)
    models[1].save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(again), logits(models[1].eval()), rtol=1e-4, atol=1e-4)


def test_trainer_under_autocast(tmp_path):
    """Losses are as near to those of an fp32 run as PEFT's own: rounding differs, and training lets it grow.

    By chance one run of theirs may be much nearer than another: several bases are trained.
    """
    settings = {"learning_rate": 2e-3, "max_steps": 12}
    errors = torch.zeros(2)
    for key in (1, 2):
        exact, *others = (
            train(adapt(llama(), config(*TARGETS, projection_prng_key=key), accelerated), tmp_path, **bf16, **settings)
            for accelerated, bf16 in ((False, {}), (False, {"bf16": True}), (True, {"bf16": True}))
        )
        assert exact[0] - exact[-1] > 0.2
        errors += torch.stack([(other - exact).abs().max() for other in others])
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # transformers 4 would train all that follows in bf16
    assert errors[0] > 0 and errors[1] <= 2 * errors[0]


def test_trainer_resumes(tmp_path):
    whole = train(adapt(llama(), config(*TARGETS)), tmp_path / "whole")
    saving = {"save_strategy": "steps", "save_steps": 4}
    train(adapt(llama(), config(*TARGETS)), tmp_path, **saving)
    model = adapt(llama(), config(*TARGETS))
    data = [{"input_ids": row, "labels": row} for row in tokens(batch=8)]
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), **SETTINGS)
    losses = Losses()
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[losses])
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    torch.testing.assert_close(torch.tensor(losses.values), whole[4:], rtol=0, atol=1e-5)


def test_sft_trainer(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    data = datasets.Dataset.from_dict({"text": [" ".join(f"w{i}" for i in row) for row in tokens(batch=8).tolist()]})
    runs = []
    for accelerated in (False, True):
        torch.manual_seed(0)
        losses = Losses()
        arguments = trl.SFTConfig(output_dir=str(tmp_path), max_length=16, bf16=False, **SETTINGS)
        if accelerated:
            integration.enable()
        try:
            trainer = trl.SFTTrainer(
                llama(), arguments, train_dataset=data, processing_class=tokenizer, callbacks=[losses],
                peft_config=copy.deepcopy(config(*TARGETS, randlora_alpha=50)),
            )  # fmt: skip
        finally:
            integration.disable()
        trainer.train()
        runs.append(torch.tensor(losses.values))
    assert runs[0][0] - runs[0][-1] > 0.1
    torch.testing.assert_close(*runs, rtol=0, atol=2e-4)


@over("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "plain"])
def test_gradient_checkpointing(reentrant, dtype):
    """The same gradients, bit for bit where those of PEFT's own layers are: some of transformers' models round anew."""

    def difference(accelerated):
        gradients = []
        for checkpointing in (False, True):
            model = adapt(llama(dtype), config(*TARGETS), accelerated).train()
            model.enable_input_require_grads()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model(input_ids=tokens(), labels=tokens()).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
        assert gradients[0].abs().max() > 0.1
        return (gradients[1] - gradients[0]).abs().max()

    ours = difference(True)
    assert ours == 0 or ours <= 4 * difference(False)


def test_dropout():
    theirs, ours = both(layers(layer=(64, 96)), config("layer", r=16, randlora_dropout=0.4))
    x = torch.ones(2000, 64)
    layer = ours.base_model.model.layer
    for model in (theirs, ours):
        model.train()
    with torch.no_grad():
        base = layer.base_layer(x)
        means, spreads = zip(*(((m(x) - base).mean(0), (m(x) - base).std(0)) for m in (theirs, ours)), strict=True)
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)
        exact = (ours(x) - base)[0]
    assert ((means[1] - exact).abs() < 5 * spreads[0] / 2000**0.5).all()
    torch.testing.assert_close(spreads[1], spreads[0], rtol=0.15, atol=0)


@pytest.mark.parametrize("how", ["built", "moved", "accelerated"])
def test_compile(how):
    """One graph, also right after the bases changed; compared with the same model uncompiled."""
    model = adapt(layers(layer=(24, 41)), config("layer", sparse=True), how != "accelerated").train()
    x = torch.randn(3, 24, dtype=torch.float64 if how == "moved" else torch.float32)
    expected = model.to(x.dtype)(x)
    layer = integration.accelerate(copy.deepcopy(model)).base_model.model.layer
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    assert layer.randlora_lambda["default"].grad.abs().max() > 0
