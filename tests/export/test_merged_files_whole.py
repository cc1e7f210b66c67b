"""Merged models in files: how much is in memory, and what is left of a work that is interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import weakref

import pytest
from helpers.failing import Failure, calls_of, fail_at
from helpers.memory import PEAK
from helpers.merged_folders import assert_loads_as, left, merged_model, saved
from helpers.models import tiny_llama

from randlora.export import shards, to_merged
from randlora.export.base_files import BaseFiles

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")


# ---- memory ----


def test_one_tensor_at_a_time(tmp_path, monkeypatch):
    """Counted: what is written is freed before the next one is read."""
    _, adapter, _model = saved(tiny_llama(), tmp_path)
    alive, content, get = [], shards._content, BaseFiles.get

    def counted(tensor):
        alive.append(weakref.ref(tensor))
        return content(tensor)

    def read(self, key):
        assert all(reference() is None for reference in alive)
        return get(self, key)

    monkeypatch.setattr(shards, "_content", counted)
    monkeypatch.setattr(BaseFiles, "get", read)
    to_merged(adapter, tmp_path / "out")
    assert len(alive) == len(safetensors.load_file(tmp_path / "out" / "model.safetensors"))


PROCESS = """
import json, os, signal, sys
from transformers import AutoModelForCausalLM
from randlora import RandLoraModel
from randlora.export import shards, to_lora, to_merged

def loaded():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[3])
    to_merged(RandLoraModel.from_pretrained(model, sys.argv[2]), sys.argv[4] + "-loaded")

import torch
torch.ones(1024, 1024) @ torch.ones(1024, 1024)  # what libraries allocate once, as for the small model below
to_merged(sys.argv[1], sys.argv[4] + "-small")
print(json.dumps([peak(lambda: to_merged(sys.argv[2], sys.argv[4] + "-large")), peak(loaded)]), flush=True)

content, calls = shards._content, []
def killing(tensor):
    calls.append(None)
    if len(calls) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return content(tensor)
shards._content = killing
to_merged(sys.argv[1], sys.argv[4], max_shard_size=9000)
"""


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """One process, as starting one takes seconds: it measures what writing takes, and is killed while it writes."""
    folder = tmp_path_factory.mktemp("process")
    _, small, model = saved(tiny_llama(), folder / "small", r=2)
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 1000}
    base, large, _ = saved(tiny_llama(**sizes), folder / "large", r=8, num_bases=4)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PEAK + PROCESS, *map(str, (small, large, base, folder / "out"))]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return folder, small, model, result


def test_memory_is_that_of_a_weight(process):
    """A model of 60 MB in one file, of weights of 2 MB; how few they are at a time is counted above."""
    folder, _, _, result = process
    if "clear_refs" in result.stderr:
        pytest.skip("this system does not let a process reset its high-water mark")
    streamed, loaded = json.loads(result.stdout)
    size = (folder / "out-large" / "model.safetensors").stat().st_size
    assert size > 55e6 and loaded > 0.8 * size
    assert streamed < 0.45 * size, f"{streamed:,d} of {size:,d} bytes"


# ---- interrupted ----


class Interrupted(BaseException):
    pass


def no_space():
    return OSError(28, "No space left on device")


@pytest.mark.parametrize("error", [Interrupted, no_space, Failure])
def test_what_raises_leaves_nothing(error, tmp_path, monkeypatch):
    """`error` makes a new one each time: one that pytest keeps would keep all that its traceback refers to."""
    expected = type(error())
    _, adapter, model = saved(tiny_llama(), tmp_path)
    content, get = shards._content, BaseFiles.get
    for at in (0, 3, 20):
        calls = []

        def failing(*args, original=content, at=at, calls=calls):
            calls.append(None)
            if len(calls) > at:
                raise error()
            return original(*args)

        for owner, name, original in ((shards, "_content", content), (BaseFiles, "get", get)):
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, lambda *args, o=original, f=failing: f(*args, original=o))
                with pytest.raises(expected):
                    to_merged(adapter, tmp_path / "deep" / "out", max_shard_size=9000)
            calls.clear()
            assert left(tmp_path) == []
    (tmp_path / "out").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(error()))
        with pytest.raises(expected):
            to_merged(model, tmp_path / "out")
    assert left(tmp_path) == ["out"] and left(tmp_path / "out") == []
    to_merged(model, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("of", ["folder", "model"])
def test_a_call_that_fails_leaves_all_or_nothing(of, tmp_path):
    """At calls all over the work, whatever is done in them."""
    _, adapter, model = saved(tiny_llama(num_hidden_layers=1), tmp_path)
    given, out = adapter if of == "folder" else model, tmp_path / "out"

    def write():
        try:
            to_merged(given, out)
        except ValueError as error:  # what libraries raise is told as such
            raise Failure(str(error)) if "has failed" in str(error) else error from error

    calls = calls_of(write)
    complete = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    shutil.rmtree(out)
    for k in [int(calls * share) for share in (0.1, 0.5, 0.8, 0.9, 0.95)] + [calls - i for i in range(1, 160, 12)]:
        if fail_at(k, write) is not None and not out.exists():
            assert left(tmp_path) == [], k
        else:
            assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == complete
            assert left(tmp_path) == ["out"], k
            shutil.rmtree(out)


def test_a_process_that_is_killed_leaves_what_is_marked_as_incomplete(process):
    folder, adapter, model, result = process
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (folder / "out").exists()
    (name,) = [path.name for path in folder.iterdir() if path.name.startswith("out.")]
    assert name.startswith("out.incomplete-") and not (folder / name / "config.json").exists()
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(folder / name)
    to_merged(adapter, folder / "out")
    assert_loads_as(folder / "out", merged_model(model))
