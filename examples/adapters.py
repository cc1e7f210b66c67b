"""Adapters on a model: put them on, merge them, write them to a folder and read them back.

The folder is PEFT's: adapter_config.json and adapter_model.safetensors with PEFT's names and keys. The random bases
are not in it: they are made again from the seed, and a fingerprint proves that they are the same ones.
"""

import json
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from text_data import UserError
from torch import nn

import randlora

FORMAT = "1"
PREFIX = "base_model.model."
HEAD = "classifier"
WEIGHTS, CONFIG, TASK = "adapter_model.safetensors", "adapter_config.json", "task.json"


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
    """Wrap the layers in place. All of them share one store of random bases, made for the largest."""
    names = find_layers(model, targets)
    layers = [model.get_submodule(name) for name in names]
    freeze_all_but_head(model)
    bases = randlora.RandomBases(
        max_dim=max(max(layer.weight.shape) for layer in layers),
        min_dim=max(min(layer.weight.shape) for layer in layers),
        r=rank,
        kind=kind,
        seed=seed,
    )
    for name, layer in zip(names, layers, strict=True):
        adapted = randlora.Linear(layer, r=rank, randlora_alpha=alpha, randlora_dropout=dropout, bases=bases)
        model.set_submodule(name, adapted)
    return model


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
    if hasattr(model, "merge_and_unload"):  # PEFT's
        return model.merge_and_unload()
    for name, layer in _adapted(model):
        layer.merge(safe_merge=True)
        model.set_submodule(name, layer.get_base_layer())
    return model


def _adapted(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, randlora.Linear)]


def save(model, folder, task):
    """Write what was trained, and `task` (a dict that names the base model, the method and the classes).

    Returns the bytes of the file with the trained numbers.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if task["method"] == "lora":
        model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the network
    elif task["method"] == "randlora":
        _save_randlora(model, folder, task)
    else:
        trained = {name: p.detach().cpu().contiguous() for name, p in model.named_parameters() if p.requires_grad}
        _write(folder / WEIGHTS, lambda path: save_file(trained, path, {"format": "pt"}))
    _write(folder / TASK, lambda path: Path(path).write_text(json.dumps(task, indent=2) + "\n", encoding="utf-8"))
    return (folder / WEIGHTS).stat().st_size


def _save_randlora(model, folder, task):
    layers = _adapted(model)
    tensors = {f"{PREFIX}{HEAD}.{name}": p for name, p in model.get_submodule(HEAD).named_parameters()}
    for name, layer in layers:
        tensors[f"{PREFIX}{name}.randlora_lambda"] = layer.randlora_lambda["default"]
        tensors[f"{PREFIX}{name}.randlora_gamma"] = layer.randlora_gamma["default"]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    names, layer = [name for name, _ in layers], layers[0][1]
    bases = layer.bases["default"]
    config = {
        "peft_type": "RANDLORA",
        "task_type": None,
        "base_model_name_or_path": task["model"],
        "inference_mode": True,
        "r": layer.r["default"],
        "randlora_alpha": layer.randlora_alpha["default"],
        "randlora_dropout": getattr(layer.randlora_dropout["default"], "p", 0.0),
        "target_modules": _short_names(model, names),
        "modules_to_save": [HEAD],
        "projection_prng_key": bases.seed,
        "save_projection": False,
        "sparse": bases.kind == "sparse",
        "very_sparse": bases.kind == "very_sparse",
        "bias": "none",
        "fan_in_fan_out": False,
        "init_weights": True,
    }
    metadata = {
        "format": "pt",
        "randlora_format": FORMAT,
        "prng": bases.prng,
        "kind": bases.kind,
        "sparsity": json.dumps(bases.sparsity),
        "seed": str(bases.seed),
        "fingerprint": bases.fingerprint(),
    }
    _write(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata))
    _write(folder / CONFIG, lambda path: Path(path).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"))


def _short_names(model, names):
    """The last components where they pick exactly these layers, else the full names."""
    short = sorted({name.rsplit(".", 1)[-1] for name in names})
    # an adapted layer holds its own nn.Linear, so the names are compared, not searched in the model again
    layers = [n for n, layer in model.named_modules() if isinstance(layer, nn.Linear) and not n.endswith("base_layer")]
    picked = [name for name in layers if name != HEAD and any(_matches(name, target) for target in short)]
    return short if picked == names else names


def _write(path, write):
    """`write(temporary file)`, then rename: a crash leaves the old file or the new one, never half of one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_task(folder):
    return json.loads(_read(Path(folder) / TASK))


def _read(path):
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def load(model, folder):
    """Put the adapter in `folder` on a fresh `model`; returns the adapted model."""
    folder = Path(folder)
    method = read_task(folder)["method"]
    if method == "lora":
        return _import_peft().PeftModel.from_pretrained(model, str(folder))
    metadata, tensors = _read_tensors(folder / WEIGHTS)
    if method == "randlora":
        config = json.loads(_read(folder / CONFIG))
        if metadata.get("randlora_format") != FORMAT:
            raise UserError(f"{folder}: format {metadata.get('randlora_format')} is not known here (known: {FORMAT})")
        add_randlora(
            model,
            config["target_modules"],
            metadata["kind"],
            config["r"],
            config["randlora_alpha"],
            config["randlora_dropout"],
            int(metadata["seed"]),
        )
        made = _adapted(model)[0][1].bases["default"].fingerprint()
        if made != metadata["fingerprint"]:
            raise UserError(
                f"{folder}: the random bases made here are not those it was trained with (fingerprint {made[:12]}..., "
                f"expected {metadata['fingerprint'][:12]}...): is this the same base model?"
            )
        tensors = {_state_dict_key(key): tensor for key, tensor in tensors.items()}
    expected = {name for name, p in model.named_parameters() if method == "full" or name.startswith(HEAD)}
    expected |= {name for name, p in model.named_parameters() if ".randlora_" in name}
    if set(tensors) != expected:
        odd = sorted(set(tensors) ^ expected)
        raise UserError(f"{folder} does not fit this model: {len(odd)} tensors differ, the first is {odd[0]}")
    try:
        model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit this model: {str(error).splitlines()[-1].strip()}") from error
    return model


def _state_dict_key(key):
    key = key.removeprefix(PREFIX)
    return key + ".default" if key.endswith((".randlora_lambda", ".randlora_gamma")) else key


def _read_tensors(path):
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def count_trainable(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
