"""Files that are of something else: an error that names the file and the reason, and a model that is as it was."""

import contextlib
import json
import math
import os
import pickle
import shutil

import pytest
import torch
from helpers.damaged import CONFIG, WEIGHTS, assert_refused, edit_config, tensors_of
from helpers.models import adapt, net
from safetensors.torch import save_file

import randlora

# ---- not this adapter ------------------------------------------------------------------------------------------------


class Wider(type(net())):
    def __init__(self):
        super().__init__()
        self.layers[1].up_proj = torch.nn.Linear(13, 31)
        self.layers[1].q_proj = torch.nn.Linear(13, 11)


def other_names():
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU())


def test_another_model(folder, peft_folder):
    assert_refused(folder, "does not fit this model: .*(modules_to_save|target_modules).* no", other_names)
    assert_refused(peft_folder, "does not fit this model: .*'q_proj' matches no layer", other_names)
    for path in (folder, peft_folder):
        assert_refused(path, r"q_proj.randlora_\w* must have shape .*of another model or rank", Wider)


def test_another_rank(folder, peft_folder):
    edit_config(folder, r=5)
    assert_refused(folder, "says r=5, but adapter_model.safetensors beside it was saved with r=4: they do not belong")
    edit_config(peft_folder, r=5)
    assert_refused(peft_folder, r"randlora_lambda must have shape \[5, 3\], got \[4, 4\].*another model or rank")


@pytest.mark.parametrize(
    "changes",
    [
        {"randlora_alpha": 3.5}, {"projection_prng_key": 1}, {"sparse": True}, {"very_sparse": True}, {"kind": "sign"},
        {"kind": "hadamard"}, {"group_width": 4},
        {"num_bases": 4}, {"prng": "peft"}, {"sparsity": 3.0}, {"r": 4.0000001},
    ],
    ids=str,
)  # fmt: skip
def test_a_config_that_belongs_to_other_weights(folder, changes):
    """All that the numbers depend on: a crash, or a file copied by hand, cannot change them unseen."""
    edit_config(folder, **changes)
    assert_refused(folder, f"says {next(iter(changes))}=.*do not belong together")


def test_what_does_not_change_numbers_may_be_edited(folder):
    edit_config(folder, randlora_dropout=0.5, base_model_name_or_path="elsewhere", strategy="factored", revision="main")
    config = randlora.RandLoraModel.from_pretrained(net(), folder).peft_config["default"]
    assert (config.randlora_dropout, config.base_model_name_or_path, config.strategy) == (0.5, "elsewhere", "factored")
    edit_config(folder, randlora_alpha="-", r="-")  # said by the weights
    assert randlora.RandLoraModel.from_pretrained(net(), folder).peft_config["default"].r == 4


def test_projections_of_another_rank_or_shape(peft_folder):
    tensors, metadata = tensors_of(peft_folder)
    for name, changed, message in (
        ("randlora_A", lambda t: t[:3], "must agree in r"),
        ("randlora_A", lambda t: t[..., :5], "too small"),
        ("randlora_A", lambda t: t[:, 0], "must have shape"),
        ("randlora_A", lambda t: t.double(), "must share dtype"),
        ("randlora_A", lambda t: t.to(torch.int32), "must be floating-point numbers, got torch.int32"),
        ("randlora_A", lambda t: t * math.nan, "holds NaN"),
        ("randlora_B", lambda t: t[:5], "too small"),
        ("randlora_B", lambda t: t.to(torch.float8_e5m2), "must be floating-point numbers"),
    ):
        key = f"base_model.{name}"
        save_file(tensors | {key: changed(tensors[key]).contiguous()}, peft_folder / WEIGHTS, metadata)
        assert_refused(peft_folder, message)
    both = {f"base_model.randlora_{x}": tensors[f"base_model.randlora_{x}"][..., :3].contiguous() for x in "A"}
    both["base_model.randlora_A"] = tensors["base_model.randlora_A"][:3].contiguous()
    both["base_model.randlora_B"] = tensors["base_model.randlora_B"][..., :3].contiguous()
    save_file(tensors | both, peft_folder / WEIGHTS, metadata)
    assert_refused(peft_folder, "config says r = 4, but these bases have r = 3")


def test_only_one_projection(peft_folder):
    tensors, metadata = tensors_of(peft_folder)
    for name in ("A", "B"):
        left = {key: t for key, t in tensors.items() if key != f"base_model.randlora_{name}"}
        save_file(left, peft_folder / WEIGHTS, metadata)
        assert_refused(peft_folder, "holds only one of randlora_A and randlora_B")


def test_missing_and_additional_keys(peft_folder):
    tensors, metadata = tensors_of(peft_folder)
    key = "base_model.model.layers.1.up_proj.randlora_gamma"
    save_file({k: t for k, t in tensors.items() if k != key}, peft_folder / WEIGHTS, metadata)
    assert_refused(peft_folder, f"has no {key}")
    for extra in ("base_model.model.layers.9.q_proj.randlora_lambda", "lm_head.weight", "base_model.model.head.weight"):
        save_file(tensors | {extra: torch.ones(2)}, peft_folder / WEIGHTS, metadata)
        assert_refused(peft_folder, f"holds what this adapter has no place for: {extra}")
    save_file({}, peft_folder / WEIGHTS, metadata)
    assert_refused(peft_folder, "it is not an adapter of this model")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(math.nan), "holds NaN"),
        (lambda t: t.fill_(-math.inf), "infinity"),
        (lambda t: t.double().fill_(1e300), r"numbers too large for torch.float32"),
        (lambda t: t.to(torch.int32), "must be floating-point numbers, got torch.int32"),
        (lambda t: t.to(torch.complex64), "must be floating-point numbers"),
        (lambda t: t.to(torch.float8_e4m3fn), "must be floating-point numbers"),
        (lambda t: t.T.contiguous(), "must have shape"),
        (lambda t: t.flatten(), "must have shape"),
    ],
    ids=["nan", "infinity", "1e300", "integers", "complex", "float8", "transposed", "flat"],
)
def test_tensors_that_are_no_parameters(peft_folder, change, message):
    tensors, metadata = tensors_of(peft_folder)
    key = "base_model.model.layers.1.up_proj.randlora_gamma"
    save_file(tensors | {key: change(tensors[key].clone())}, peft_folder / WEIGHTS, metadata)
    assert_refused(peft_folder, message)


def test_biases_are_complete(folder):
    """Ours says which there are; what PEFT up to 0.20 wrote without them only warns (test_checkpoint_peft.py)."""
    from randlora.checkpoint import layout

    tensors, metadata = tensors_of(folder)
    said = json.loads(metadata["randlora"])
    del tensors["base_model.model.layers.0.down_proj.bias"]
    said["sha256"] = layout.checksum(said, tensors)
    save_file(tensors, folder / WEIGHTS, {"randlora": json.dumps(said)})
    assert_refused(folder, r"lacks the trained biases of this model, such as layers.0.down_proj.bias")


# ---- no file, no folder, no permission -------------------------------------------------------------------------------


def test_no_weights(folder, tmp_path):
    (folder / WEIGHTS).unlink()
    assert_refused(folder, "adapter_model.safetensors: cannot be read: No such file or directory")
    (folder / WEIGHTS).mkdir()
    assert_refused(folder, "adapter_model.safetensors: cannot be read: Is a directory")
    assert_refused(tmp_path / "none", "there is no such folder")
    (tmp_path / "file").write_text("")
    assert_refused(tmp_path / "file", "is a file: the adapter's folder was expected")


def test_a_whole_model_is_no_adapter(folder):
    (folder / WEIGHTS).rename(folder / "model.safetensors")
    (folder / "adapter_config.json").unlink()  # as transformers' own Trainer leaves it
    assert_refused(folder, r"holds a whole model \(model.safetensors\).*integrations.transformers.Trainer resumes")


def test_a_pickle_is_not_opened(folder):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "it ran"),)

    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
    assert_refused(folder, "adapter_model.bin is a pickle, which can run any code")
    shutil.copy(folder / "adapter_model.bin", folder / WEIGHTS)
    assert_refused(folder, "no readable safetensors file")
    assert not (folder / "it ran").exists()


@contextlib.contextmanager
def as_nobody():
    """Root may read everything."""
    if (user := os.geteuid()) == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("which", [CONFIG, WEIGHTS, "."])
def test_permission_denied(folder, which):
    for parent in list(folder.parents)[:3]:
        parent.chmod(0o755)
    (folder / which).chmod(0)
    try:
        with as_nobody():
            assert_refused(folder, "[Pp]ermission denied")
    finally:
        (folder / which).chmod(0o755)


def test_a_folder_that_cannot_be_written(tmp_path):
    for parent in list(tmp_path.parents)[:2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o555)
    model = adapt(net())
    try:
        with as_nobody(), pytest.raises(PermissionError, match=r"[Pp]ermission denied"):
            model.save_pretrained(tmp_path)
    finally:
        tmp_path.chmod(0o755)
    assert list(tmp_path.iterdir()) == []
