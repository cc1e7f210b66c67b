"""Saving: small files, the same bytes every time, whole files whatever interrupts it; and loading from the Hub."""

import contextlib
import os
import random
import sys
import time
import types

import pytest
from helpers.checkpoints import CARD, CONFIG, WEIGHTS, assert_same_numbers, keys_of, load
from helpers.models import adapt, assert_computes, net, randomize
from helpers.savers import alive, before_deadline, kill
from torch import nn

import randlora
from randlora.checkpoint.replace import replace_files

# ---- size and bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [16, 64])
def test_without_projections_a_file_holds_the_trained_numbers_only(tmp_path, r):
    model = nn.Sequential(nn.Linear(768, 768), nn.Linear(768, 768))
    model = randlora.get_peft_model(
        model, randlora.RandLoraConfig(r=r, target_modules="all-linear", save_projection=False)
    )
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    model.save_pretrained(tmp_path)
    assert trained < (tmp_path / WEIGHTS).stat().st_size < (1.01 if r == 16 else 1.04) * trained


def test_projections_are_written_once(tmp_path):
    model = adapt(net())
    model.save_pretrained(tmp_path)
    assert {key for key in keys_of(tmp_path) if "randlora_A" in key or "randlora_B" in key} == {
        "base_model.randlora_A", "base_model.randlora_B",
    }  # fmt: skip


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    """safetensors writes several entries of metadata in random order."""
    model = adapt(net(), modules_to_save=["head"])
    files = set()
    for i in range(6):
        model.save_pretrained(tmp_path / str(i))
        files.add((tmp_path / str(i) / WEIGHTS).read_bytes())
    assert len(files) == 1


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        adapt(net()).save_pretrained(tmp_path / "adapter")
    finally:
        os.umask(old)
    assert {(tmp_path / "adapter" / name).stat().st_mode & 0o777 for name in (CONFIG, WEIGHTS)} == {0o640}


# ---- interruptions ---------------------------------------------------------------------------------------------------


def no_leftovers(folder):
    return {p.name for p in folder.iterdir()} == {CONFIG, WEIGHTS, CARD}


def test_an_interrupted_save_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = adapt(net())
    model.save_pretrained(tmp_path)
    old = (tmp_path / WEIGHTS).read_bytes()
    randomize(model, seed=5)

    def half(tensors, path, metadata):
        path.write_bytes(b"half of a f")
        raise KeyboardInterrupt

    monkeypatch.setattr("randlora.checkpoint.writing.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == old and no_leftovers(tmp_path)


@pytest.mark.parametrize("step", ["unlink", "weights", "config"])
def test_a_crash_between_the_two_files(tmp_path, monkeypatch, step):
    """Another alpha, and the process ends before, between or after the renames: the old adapter or the new one."""
    old = adapt(net())
    old.save_pretrained(tmp_path)
    new = adapt(net(), seed=5, randlora_alpha=7)

    class Crash(BaseException):
        pass

    replaced = []

    def replace(source, target, original=os.replace):
        name = os.path.basename(target)
        if (step, name) in (("unlink", WEIGHTS), ("weights", CONFIG)):
            raise Crash
        original(source, target)
        replaced.append(name)
        if (step, name) == ("config", CONFIG):
            raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(os, "replace", replace)
        new.save_pretrained(tmp_path)
    assert replaced == {"unlink": [], "weights": [WEIGHTS], "config": [WEIGHTS, CONFIG]}[step]
    assert_same_numbers(load(tmp_path), old if step == "unlink" else new)
    assert (tmp_path / CONFIG).exists() == (step == "config"), "PEFT must not take one's alpha for the other"


def test_an_unchanged_config_is_never_gone(tmp_path, monkeypatch):
    model = adapt(net())
    model.save_pretrained(tmp_path)
    seen = []

    def replace(source, target, original=os.replace):
        seen.append((tmp_path / CONFIG).exists())
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    randomize(model, seed=3).save_pretrained(tmp_path)
    assert seen == [True, True]


def identity(path):
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime_ns
    return None


def test_kill_9_in_the_middle_of_saving(tmp_path, start_saving):
    """Until both adapters have been found, and what only the middle of saving leaves behind."""
    generator, folder = random.Random(0), tmp_path / "adapter"
    references = {alpha: adapt(net(), randlora_alpha=alpha) for alpha in (3.0, 5.0)}
    seen, leftovers, rounds, in_time = set(), 0, 0, before_deadline(180)
    while rounds < 13 or len(seen) < 2 or not leftovers:
        rounds += 1
        before, started = identity(folder / WEIGHTS), time.perf_counter()
        pid = start_saving(folder, "35")
        while identity(folder / WEIGHTS) == before:
            in_time(f"{rounds} rounds left {seen} and {leftovers} times something unfinished")
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 2 * (time.perf_counter() - started)))
        assert alive(pid)
        kill(pid)
        again = load(folder)
        alpha = again.peft_config["default"].randlora_alpha
        assert_same_numbers(again, references[alpha])
        seen.add(alpha)
        leftovers += not no_leftovers(folder)
    assert seen == {3.0, 5.0}
    references[5.0].save_pretrained(folder)
    assert no_leftovers(folder), "the next save clears up"


def test_processes_that_save_at_once(tmp_path, start_saving):
    folder = tmp_path / "adapter"
    references = {alpha: adapt(net(), randlora_alpha=alpha) for alpha in (3.0, 5.0)}
    pids = [start_saving(folder, alphas) for alphas in ("3", "5", "35")]
    for _ in range(8):
        time.sleep(0.03)
        references[3.0].save_pretrained(folder)
        assert all(map(alive, pids)), "one of them failed"
    for pid in pids:
        kill(pid)
    again = load(folder)
    assert_same_numbers(again, references[again.peft_config["default"].randlora_alpha])


def test_temporary_files_of_a_running_save_are_left_alone(tmp_path):
    """Where file systems have no locks nobody knows whose they are."""
    stale = tmp_path / ".randlora-abc.tmp"
    stale.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fcntl.flock", lambda *a: (_ for _ in ()).throw(OSError(95, "not supported")))
        replace_files(tmp_path, {"a": lambda path: path.write_text("1")})
    assert stale.exists() and (tmp_path / "a").read_text() == "1"
    replace_files(tmp_path, {"a": lambda path: path.write_text("2")})
    assert not stale.exists() and (tmp_path / "a").read_text() == "2"


# ---- the Hugging Face Hub --------------------------------------------------------------------------------------------


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    adapt(net()).save_pretrained(tmp_path)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, sorted(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert_computes(load("some-user/an.adapter"), ["default"])
    assert randlora.RandLoraConfig.from_pretrained("some-user/an.adapter").r == 4
    assert asked == 2 * [("some-user/an.adapter", [CONFIG, WEIGHTS])]


def test_no_folder_and_no_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = net()
    for name in ("../adapter", "/no/such/folder", "adapter", "a/b/c", tmp_path / "user/adapter"):
        with pytest.raises(ValueError, match="there is no such folder"):
            load(name, model)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match=r"user/adapter: there is no such folder.*pip install huggingface_hub"):
        load("user/adapter", model)

    def offline(*_, **__):
        raise ConnectionError("Cannot reach it: offline mode is enabled.\nMore.")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=offline))
    with pytest.raises(
        ValueError, match=r"no such folder, and no repository 'user/adapter' .*offline mode is enabled\.$"
    ):
        load("user/adapter", model)


def test_offline_with_the_real_library(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"^no-such-user/no-such-adapter: .* no such folder, and no repository"):
        randlora.RandLoraConfig.from_pretrained("no-such-user/no-such-adapter")
