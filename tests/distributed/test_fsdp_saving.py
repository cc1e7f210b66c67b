"""Adapters that FSDP2 shards, in files: gathered by all ranks, written by one, the same bytes as of one process."""

import errno
import os
import sys
import types
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from helpers.models import IDS, adapt, add, net, randomize
from helpers.ranks import shard

import randlora

distributed = torch.distributed
pytest.importorskip("torch.distributed.fsdp")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch.distributed.checkpoint.state_dict import (  # noqa: E402
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # noqa: E402
from torch.distributed.tensor import Replicate, distribute_tensor  # noqa: E402

from randlora.checkpoint import replace  # noqa: E402
from randlora.distributed.gathering import Processes, copy_into  # noqa: E402


def contents(folder):
    """Path -> bytes of all files."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def everything(dtype=torch.float64):
    """Two adapters, a bias for each layer, a module to save, all with random numbers."""
    model = adapt(net(dtype), modules_to_save=["head"], bias="all")
    add(model, "second", seed=2, kind="hadamard")
    with torch.no_grad():
        for i, p in enumerate(model.model.head.modules_to_save.parameters()):
            p.add_(0.1 * i + 0.1)
    return model


def saving(folder, axes):
    folder, rank = Path(folder), distributed.get_rank()
    if rank == 0:
        everything().save_pretrained(folder / "single")
    mesh = init_device_mesh("cpu", axes, mesh_dim_names=("replicated", "split")[-len(axes) :])
    models = {"blocks": shard(everything(), mesh=mesh)}
    if len(axes) == 1:
        models["whole"] = fully_shard(everything(), mesh=mesh)
        models["cast"] = shard(everything(), mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32))
    for name, model in models.items():
        model.save_pretrained(folder / f"{name} at start")
        model(IDS).sum().backward()
        model.save_pretrained(folder / f"{name} after a step")
        with torch.no_grad():
            model(IDS)  # leaves the root's parameters put together, and cast
        model.save_pretrained(folder / f"{name} after a call", is_main_process=rank == 1)
        model.save_pretrained(folder / f"{name} given", state_dict=model.state_dict())
        gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        assert bool(gathered) == (rank == 0)
        model.save_pretrained(folder / f"{name} gathered", state_dict=gathered, is_main_process=rank == 0)
    distributed.barrier()
    return {path.name: contents(path) for path in folder.iterdir()}


def assert_same_files(found, models):
    expected = found.pop("single")
    assert len(expected) == 5 and len(found) == 5 * models
    for name, files in found.items():
        assert files == expected, name


def test_files_are_those_of_one_process(two_ranks, tmp_path):
    assert_same_files(two_ranks(saving, folder=str(tmp_path), axes=[2])[0], models=3)


def test_files_of_parts_that_are_replicated(four_ranks, tmp_path):
    assert_same_files(four_ranks(saving, folder=str(tmp_path), axes=[2, 2])[0], models=1)


def one_of_two():
    """With the processes of a group alone: a mesh of its own would live on in what DTensor remembers of meshes."""
    processes = Processes([distributed.new_group(timeout=timedelta(seconds=2))])
    if distributed.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"all must call save_pretrained, not the first one alone.*[Tt]imed out"):
            processes.chosen(True)
    return True


def test_a_save_that_waits_in_vain_says_for_what(two_ranks):
    assert two_ranks(one_of_two) == [True, True]


def alone(folder):
    """Where nothing is sharded no rank waits for another: one saves, and the others do not."""
    model = everything()
    if distributed.get_rank() == 1:
        model.save_pretrained(folder)
    base = net()
    fully_shard(base.layers[0])
    model = randlora.get_peft_model(base, randlora.RandLoraConfig(r=4, target_modules=r"layers\.1\..*"))
    if distributed.get_rank() == 0:  # what is sharded is no part of the adapter
        model.save_pretrained(Path(folder) / "of rank 0")
    # Each rank has all of a tensor that is replicated.
    model, mesh = adapt(net()), init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        for parameters in layer.q_proj.trained_parts():
            parameters["default"] = torch.nn.Parameter(
                distribute_tensor(parameters["default"].detach(), mesh, [Replicate()], src_data_rank=None)
            )
    if distributed.get_rank() == 1:
        model.save_pretrained(Path(folder) / "replicated")
        adapt(net()).save_pretrained(Path(folder) / "ordinary")
    return True


def test_no_rank_waits_where_nothing_is_sharded(two_ranks, tmp_path):
    assert two_ranks(alone, folder=str(tmp_path)) == [True, True]
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "of rank 0" / "adapter_model.safetensors").is_file()
    assert contents(tmp_path / "replicated") == contents(tmp_path / "ordinary")


def failing(folder):
    """What each rank sees of errors of the one that writes, and of one that only one has."""
    folder, seen = Path(folder), []
    model = shard(adapt(net()))
    model.save_pretrained(folder)
    before = contents(folder)

    def attempt(target=folder, state_dict=None):
        try:
            model.save_pretrained(target, state_dict=state_dict)
        except Exception as error:
            assert contents(folder) == before
            seen.append((type(error).__name__, getattr(error, "errno", None), str(error)))
        else:
            seen.append(None)

    original = replace._sync
    if distributed.get_rank() == 0:

        def full(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        replace._sync = full
    attempt()
    replace._sync = original
    if distributed.get_rank() == 0:

        class OfNoModule(Exception):
            """What cannot be sent to another process."""

        def failing(path):
            raise OfNoModule("on purpose")

        replace._sync = failing
    attempt()
    replace._sync = original
    attempt(folder / "adapter_config.json")  # a file in the place of the folder
    state = model.state_dict()
    attempt(state_dict=state)
    key = next(key for key in state if "lambda" in key)
    if distributed.get_rank() == 1:
        del state[key]
    attempt(state_dict=state)
    with torch.no_grad():
        model.model.layers[0].q_proj.randlora_lambda["default"]._local_tensor.fill_(torch.nan)
    attempt()
    return seen


def test_errors_are_raised_on_every_rank(two_ranks, tmp_path):
    seen, other = two_ranks(failing, folder=str(tmp_path))
    assert seen[:1] + seen[2:] == other[:1] + other[2:]
    assert seen[1] == ("OfNoModule", None, "on purpose") and other[1] == (
        "RuntimeError",
        None,
        "OfNoModule: on purpose",
    )
    full, _, no_folder, fine, missing, numbers = seen
    assert full[:2] == ("OSError", errno.ENOSPC)
    assert no_folder[0] in ("NotADirectoryError", "FileExistsError")
    assert fine is None
    assert missing[0] == "ValueError" and "state_dict has no model.layers.0.q_proj.randlora_lambda" in missing[2]
    assert numbers[0] == "ValueError" and "holds NaN" in numbers[2]


def uploading():
    calls = []

    class HfApi:
        def __init__(self, token):
            pass

        def create_repo(self, repo_id, **kwargs):
            calls.append("create")
            return types.SimpleNamespace(repo_id=repo_id)

        def file_exists(self, repo_id, name, **kwargs):
            return False

        def upload_folder(self, folder_path, **kwargs):
            calls.append(sorted(contents(folder_path)))

    before = sys.modules.get("huggingface_hub")
    sys.modules["huggingface_hub"] = types.SimpleNamespace(HfApi=HfApi)
    try:
        shard(adapt(net())).push_to_hub("user/adapter")
    finally:
        sys.modules.pop("huggingface_hub")
        if before is not None:
            sys.modules["huggingface_hub"] = before
    return calls


def test_one_rank_uploads(two_ranks):
    assert two_ranks(uploading) == [["create", ["README.md", "adapter_config.json", "adapter_model.safetensors"]], []]


# ---- torch.distributed.checkpoint ----


GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


def with_optimizer(model):
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()
    return model(IDS).detach()


def write_checkpoint(folder):
    """After two steps; returns the outputs after two more."""
    model, optimizer = with_optimizer(shard(everything()))
    train(model, optimizer, 2)
    dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=f"{folder}/all")
    state, of_optimizer = get_state_dict(model, optimizer, options=TRAINED)
    dcp.save({"model": state, "optimizer": of_optimizer}, checkpoint_id=f"{folder}/trained")
    gathered = get_model_state_dict(model, options=GATHERED)
    if distributed.get_rank() == 0:
        torch.save(gathered, f"{folder}/gathered.pt")
    return sorted(state), model(IDS).detach(), train(model, optimizer, 2)


def read_checkpoint(folder, whole=False):
    """Outputs of a model that began with other numbers, three times, and the outputs after two more steps."""

    def fresh():
        model = everything()
        for name in ("default", "second"):
            randomize(model, name, seed=7)
        return with_optimizer(model if whole else shard(model))

    model, optimizer = fresh()
    state = {"model": get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=f"{folder}/all")
    set_model_state_dict(model, state["model"])
    outputs = [model(IDS).detach()]

    model, optimizer = fresh()
    state, of_optimizer = get_state_dict(model, optimizer, options=TRAINED)
    state = {"model": state, "optimizer": of_optimizer}
    dcp.load(state, checkpoint_id=f"{folder}/trained")
    set_state_dict(
        model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINED
    )
    with torch.no_grad():  # the frozen adapter is no part of it
        for a, b in zip(linears(model), linears(everything()), strict=True):
            for mine, theirs in zip(a.trained_parts(), b.trained_parts(), strict=True):
                copy_into(mine["second"], theirs["second"])
    outputs += [model(IDS).detach(), train(model, optimizer, 2)]

    model, optimizer = fresh()
    first = whole or distributed.get_rank() == 0
    state = torch.load(f"{folder}/gathered.pt") if first else {}
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=not whole))
    return [*outputs, model(IDS).detach()]


def linears(model):
    return [module for module in model.modules() if isinstance(module, randlora.Linear)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoints_of_two_ranks_are_read_by_one_and_by_four(two_ranks, four_ranks, tmp_path):
    names, now, later = two_ranks(write_checkpoint, folder=str(tmp_path))[0]
    assert all(key.rpartition(".")[2] in ("default", "bias") or "modules_to_save.default" in key for key in names)
    assert (now - later).abs().max() > 0.01
    found = [read_checkpoint(str(tmp_path), whole=True), *four_ranks(read_checkpoint, folder=str(tmp_path))]
    assert len(found) == 5
    for outputs in found:
        for output, expected in zip(outputs, (now, now, later, now), strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
