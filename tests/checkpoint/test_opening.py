"""What is refused before it is read: no regular file, too large; and pairs of files while another process saves."""

import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import assert_same_numbers, load
from helpers.damaged import CONFIG, WEIGHTS, assert_refused, read_header, tensors_of, write_header
from helpers.memory import little_memory
from helpers.models import adapt, net
from helpers.savers import before_deadline
from safetensors.torch import save_file

import randlora
from randlora.checkpoint import layout, opening


@pytest.fixture(params=["ours", "ours_small", "peft", "peft_small"])
def folder(request, folders, tmp_path):
    return shutil.copytree(folders / request.param, tmp_path / "adapter")


# ---- kinds -----------------------------------------------------------------------------------------------------------

KINDS = {
    "fifo": (os.mkfifo, "is a FIFO: a regular file was expected"),
    "zero": (lambda path: os.symlink("/dev/zero", path), "is a device: a regular file was expected"),
    "random": (lambda path: os.symlink("/dev/random", path), "is a device"),
    "terminal": (lambda path: os.symlink("/dev/tty", path), "is a device|cannot be read"),
    "directory": (os.mkdir, "cannot be read: Is a directory"),
    "loop": (lambda path: os.symlink(path, path), "cannot be read: Too many levels of symbolic links"),
    "dangling": (lambda path: os.symlink(f"{path}.none", path), "cannot be read: No such file"),
    "process": (lambda path: os.symlink("/proc/self/mem", path), "cannot be read|no readable|no valid JSON"),
}


@pytest.mark.parametrize("which", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("kind", KINDS)
def test_no_regular_file(folder, kind, which):
    make, message = KINDS[kind]
    (folder / which).unlink()
    make(folder / which)
    with little_memory():
        assert_refused(folder, message)
        with pytest.raises(ValueError, match=message):
            randlora.RandLoraConfig.from_pretrained(folder)


@pytest.mark.parametrize("which", [CONFIG, WEIGHTS])
def test_a_socket(folder, which, monkeypatch):
    (folder / which).unlink()
    monkeypatch.chdir(folder)  # the path of a socket must be short
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        server.bind(which)
        assert_refused(folder, "is a socket: a regular file was expected")


@pytest.mark.parametrize("which", [CONFIG, WEIGHTS])
def test_a_fifo_that_takes_the_place_of_a_file(folders, tmp_path, which, monkeypatch):
    """Between looking at the name and opening it: it is not waited for, and the open file is looked at again."""
    folder = shutil.copytree(folders / "ours", tmp_path / "adapter")

    def swapped(path, *arguments, original=os.open, **keywords):
        if os.path.basename(path) == which and not swapped.done:
            swapped.done = True
            os.unlink(path)
            os.mkfifo(path)
        return original(path, *arguments, **keywords)

    swapped.done = False
    monkeypatch.setattr(opening.os, "open", swapped)
    with pytest.raises(ValueError, match=f"{which} is a FIFO"):
        load(folder)
    assert swapped.done


def test_links_as_in_the_cache_of_the_hub(folder, tmp_path):
    expected = load(folder)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(blobs / name[:9])
        (snapshot / name).symlink_to(f"../../blobs/{name[:9]}")
    assert_same_numbers(load(snapshot), expected)


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b", "x" * 5000, "a\nb/c"], ids=repr)
def test_paths_that_cannot_be(path):
    with pytest.raises(ValueError, match=r"cannot be read|there is no such folder"):
        load(path)
    with pytest.raises(ValueError, match=r"cannot be read|there is no such folder"):
        randlora.RandLoraConfig.from_pretrained(path)


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_large_config(folder):
    with open(folder / CONFIG, "r+b") as file:
        file.truncate(3 << 30)
    with little_memory():
        assert_refused(folder, f"{CONFIG} has {3 << 30} bytes, where at most {layout.LONGEST_CONFIG} were expected")
    (folder / CONFIG).write_text(json.dumps({"r": 4}) + " " * layout.LONGEST_CONFIG)
    assert_refused(folder, "where at most")


def add_hole(path, key, shape):
    """A tensor of zeros that takes no disk."""
    header, data = read_header(path)
    size = 4 * torch.Size(shape).numel()
    header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + size]}
    write_header(path, header, data)
    os.truncate(path, path.stat().st_size + size)


@pytest.mark.parametrize("kind", ["ours", "peft"])
@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("base_model.randlora_B", [1 << 17, 512, 4], r"base_model.randlora_B \[131072, 512, 4\] is too large"),
        ("base_model.randlora_A", [4, 1, 1 << 26], "base_model.randlora_A .* is too large"),
        ("base_model.model.layers.0.q_proj.randlora_B", [1 << 28], "randlora_B .* is too large"),
        ("base_model.model.layers.0.q_proj.randlora_lambda", [4, 1 << 26], "must have shape"),
        ("base_model.model.layers.0.q_proj.more", [1 << 28], "has no place for"),
        ("elsewhere", [1 << 28], "has no place for"),
    ],
)
def test_large_tensors_are_refused_by_the_header(folders, tmp_path, kind, key, shape, message, monkeypatch):
    """1 GiB of projections for a layer that is 13 wide, or of something else: nothing of it is read."""
    folder = shutil.copytree(folders / kind, tmp_path / "adapter")
    tensors, metadata = tensors_of(folder)
    tensors.pop(key, None)
    save_file(tensors, folder / WEIGHTS, metadata)
    add_hole(folder / WEIGHTS, key, shape)
    read = []
    monkeypatch.setattr("randlora.checkpoint.weights.Weights.get", lambda self, key: read.append(key))
    assert_refused(folder, message)
    assert not read


@pytest.mark.parametrize("size", [2**63, 2**40, 99_999_999, 0, 1])
def test_a_header_that_lies_about_its_length(folder, size):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])
    with little_memory():
        assert_refused(folder, "no readable safetensors file")


# ---- pairs -----------------------------------------------------------------------------------------------------------


def pairs(tmp_path):
    """Two adapters of the same shapes and other numbers, alpha and targets' order, in folders of their own."""
    models = adapt(net()), adapt(net(), seed=5, randlora_alpha=7, randlora_dropout=0.25, kind="sparse")
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    return models


STEPS = 8  # calls that open or look at a file


@pytest.mark.parametrize("when", range(1, STEPS + 2))
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_save_between_any_two_steps_of_reading(tmp_path, order, when, monkeypatch):
    """Whenever it comes: the old adapter or the new one."""
    models = pairs(tmp_path)
    old, new = (models[i] for i in order)
    old.save_pretrained(tmp_path / "adapter")
    steps = {"count": 0, "saved": False}

    def step():
        steps["count"] += 1
        if steps["count"] == when:
            steps["saved"] = True
            with monkeypatch.context() as patch:
                patch.undo()
                new.save_pretrained(tmp_path / "adapter")

    def before(module, name):
        original = getattr(module, name)

        def wrapped(*arguments, **keywords):
            if not steps["saved"] and sys._getframe(1).f_code.co_filename == opening.__file__:
                step()
            return original(*arguments, **keywords)

        monkeypatch.setattr(module, name, wrapped)

    before(os, "open"), before(os, "stat"), before(os, "fstat")
    found = load(tmp_path / "adapter")
    monkeypatch.undo()
    expected = new if found.peft_config["default"].randlora_alpha == new.peft_config["default"].randlora_alpha else old
    assert_same_numbers(found, expected)
    assert found.peft_config["default"].randlora_dropout == expected.peft_config["default"].randlora_dropout
    assert steps["saved"] == (when <= STEPS)


def test_ours_over_one_of_peft(folders, tmp_path, monkeypatch):
    """Between the files of PEFT and ours there is a moment without a config: it is waited for."""
    folder = shutil.copytree(folders / "peft", tmp_path / "adapter")
    new = adapt(net(), seed=5)
    found = []

    def replace(source, target, original=os.replace):
        if not found and os.path.basename(target) == WEIGHTS:
            assert not (folder / CONFIG).exists()
            process = subprocess.Popen([sys.executable, "-c", READER, str(folder)], stdout=subprocess.PIPE, text=True)
            assert process.stdout.readline() == "waits\n"
            found.append(process)
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    new.save_pretrained(folder)
    assert found[0].communicate(timeout=120)[0] == "3\n"


READER = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from helpers.models import net
import randlora
original = time.sleep
def sleep(seconds):
    print("waits", flush=True)
    time.sleep = original
    original(seconds)
time.sleep = sleep
print(randlora.RandLoraModel.from_pretrained(net(), sys.argv[1]).peft_config["default"].randlora_alpha)
"""


def test_files_that_change_all_the_time(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders / "ours", tmp_path / "adapter")
    monkeypatch.setattr(opening.OpenFile, "is_current", lambda self: False)
    assert_refused(folder, "are replaced all the time")


def test_reading_while_another_process_saves(tmp_path, start_saving):
    """Until both adapters have been read."""
    folder = tmp_path / "adapter"
    references = {alpha: adapt(net(), randlora_alpha=alpha) for alpha in (3.0, 5.0)}
    references[3.0].save_pretrained(folder)
    start_saving(folder, "35")
    seen, reads, in_time = set(), 0, before_deadline(180)
    while reads <= 31 or len(seen) < 2:
        in_time(f"{reads} reads saw {seen}")
        reads += 1
        found = load(folder)
        alpha = found.peft_config["default"].randlora_alpha
        assert_same_numbers(found, references[alpha])
        seen.add(alpha)
    assert seen == {3.0, 5.0}
