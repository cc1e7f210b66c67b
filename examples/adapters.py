"""Adapters on a model: put them on, merge them, write them to a folder and read them back.

RandLoRA by randlora, LoRA by PEFT; both write PEFT's folder, adapter_config.json and adapter_model.safetensors. The
random bases are not in it: they are made again from the seed, and a fingerprint proves that they are the same ones.
"""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from text_data import UserError
from torch import nn

import randlora

HEAD = "classifier"
WEIGHTS, TASK = "adapter_model.safetensors", "task.json"


def find_layers(model, targets):
    """Names of the linear layers outside the head that match: PEFT's rule, a whole name or its last components."""
    linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and name != HEAD]
    if not linear:
        raise UserError("this model has no torch.nn.Linear layer to adapt")
    if targets == ["all-linear"]:
        return linear
    for target in targets:
        if not any(_matches(name, target) for name in linear):
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(f"target '{target}' matches no linear layer of this model; its linear layers are: {known}")
    return [name for name in linear if any(_matches(name, target) for target in targets)]


def _matches(name, target):
    return name == target or name.endswith("." + target)


def freeze_all_but_head(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(HEAD))


def add_randlora(model, targets, kind, rank, alpha, dropout, seed):
    config = randlora.RandLoraConfig(
        r=rank,
        randlora_alpha=alpha,
        randlora_dropout=dropout,
        kind=kind,
        projection_prng_key=seed,
        save_projection=False,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=[HEAD],
    )
    return randlora.get_peft_model(model, config)


def add_lora(model, targets, rank, alpha, dropout):
    """Plain LoRA, for comparison, by PEFT."""
    peft = _import_peft()
    # PEFT shortens a list of full names to the suffixes that tell them apart
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=find_layers(model, targets),
        modules_to_save=[HEAD],
    )
    return peft.get_peft_model(model, config)


def _import_peft():
    try:
        import peft
    except ImportError as error:
        raise UserError("--method lora needs PEFT: pip install peft") from error
    return peft


def merge(model):
    """Fold the updates into the weights: a plain model, without adapters, as fast as the original."""
    return model.merge_and_unload(safe_merge=True)


def save(model, folder, task):
    """Write what was trained, and `task` (a dict that names the base model, the method and the classes).

    Returns the bytes of the file with the trained numbers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if task["method"] == "lora":
        model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the network
    elif task["method"] == "randlora":
        model.peft_config["default"].base_model_name_or_path = task["model"]
        model.save_pretrained(folder)
    else:
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        save_file(trained, folder / WEIGHTS, {"format": "pt"})
    (folder / TASK).write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8")
    return (folder / WEIGHTS).stat().st_size


def read_task(folder):
    path = Path(folder) / TASK
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def load(model, folder):
    """Put the adapter in `folder` on a fresh `model`; returns the adapted model."""
    method = read_task(folder)["method"]
    if method == "lora":
        return _import_peft().PeftModel.from_pretrained(model, str(folder))
    try:
        if method == "randlora":
            return randlora.RandLoraModel.from_pretrained(model, folder)
        tensors = load_file(Path(folder) / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"cannot load the adapter: {error}") from error
    expected = {name for name, _ in model.named_parameters() if method == "full" or name.startswith(HEAD)}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise UserError(f"{folder} does not fit this model: {len(odd)} tensors differ, the first is {odd[0]}")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit this model: {str(error).splitlines()[-1].strip()}") from error
    return model


def count_trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
