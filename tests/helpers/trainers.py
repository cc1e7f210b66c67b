"""Short runs of transformers' Trainer on a tiny Llama, of randlora or of PEFT accelerated, which can be resumed."""

import contextlib
import functools
import io

import torch

from helpers.models import WORDS, adapt, tiny_llama
from randlora.distributed.gathering import whole

SETTINGS = {
    "r": 4, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"], "modules_to_save": ["norm"],
    "save_projection": False,
}  # fmt: skip
# The highest loss counts as the best one: that of the first checkpoint.
BEST_IS_FIRST = {
    "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "metric_for_best_model": "loss",
    "greater_is_better": True,
}  # fmt: skip


def our_model(dropout=0.0, **changes):
    return adapt(tiny_llama(**changes), seed=3, randlora_dropout=dropout, randlora_alpha=0.5, **SETTINGS)


def peft_model(dropout=0.0):
    """PEFT's own classes, computed by randlora."""
    import peft

    import randlora.integrations.peft as integration

    config = peft.RandLoraConfig(randlora_alpha=8, randlora_dropout=dropout, **SETTINGS)
    with integration.enable(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return peft.get_peft_model(tiny_llama(), config)


def rows(count):
    ids = torch.randint(1, WORDS, (count, 6), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def make_trainer(model, folder, cls=None, **settings):
    import transformers

    from randlora.integrations.transformers import Trainer

    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.02, "logging_steps": 1, "report_to": [],
        "use_cpu": True, "save_strategy": "steps", "save_steps": 2, "disable_tqdm": True, "seed": 1,
        "logging_nan_inf_filter": False, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(output_dir=str(folder), **defaults | settings)
    # Few rows and several epochs, so that the loss of the rows to evaluate falls.
    return (cls or Trainer)(model=model, args=arguments, train_dataset=rows(16), eval_dataset=rows(6))


def train(trainer, resume=None):
    """Losses by step of what this call has trained, and the trained numbers afterwards."""
    start = 0 if resume is None else int(str(resume).rpartition("-")[2])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train(resume_from_checkpoint=resume and str(resume))
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return {step: loss for step, loss in losses.items() if step > start}, trained(trainer.model)


def trained(model):
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters() if p.requires_grad}


@functools.cache
def tokenizer():
    """A word each for the ids of a tiny Llama."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<eos>", "<unk>", *"abcdefghijklmnop"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
