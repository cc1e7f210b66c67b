"""What is written: numbers that can be loaded again, one snapshot of them, or nothing; and a disk that is full."""

import errno
import math
import os
import resource
import threading

import pytest
import torch
from helpers.checkpoints import CARD, CONFIG, WEIGHTS, assert_same_numbers, load
from helpers.models import adapt, add, net, randomize
from torch import nn

import randlora
from randlora.checkpoint import writing


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def adapted(**settings):
    return adapt(net(), modules_to_save=["head"], bias="all", **settings)


# ---- numbers that are none -------------------------------------------------------------------------------------------

PLACES = {
    "lambda": (lambda m: m.model.layers[0].q_proj.randlora_lambda["default"], "model.layers.0.q_proj.randlora_lambda"),
    "gamma": (lambda m: m.model.layers[1].up_proj.randlora_gamma["default"], "model.layers.1.up_proj.randlora_gamma"),
    "bias": (lambda m: m.model.layers[1].down_proj.base_layer.bias, "model.layers.1.down_proj.bias"),
    "saved": (lambda m: m.model.head.modules_to_save["default"].weight, "model.head.modules_to_save.default.weight"),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_nan_is_refused_before_anything_is_written(tmp_path, place, value):
    """By its name, and with a good adapter beside it, of which nothing is written either."""
    model = adapted()
    add(model, "a", 3), add(model, "z", 4)
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    randomize(model, seed=6), randomize(model, "a", seed=7)
    find, name = PLACES[place]
    with torch.no_grad():
        find(model).flatten()[-1] = value
    with pytest.raises(ValueError, match=f"adapter 'default' cannot be saved: {name}.* holds NaN, infinity"):
        model.save_pretrained(tmp_path, ["a", "default", "z"])
    with pytest.raises(ValueError, match="holds NaN"):
        model.save_pretrained(tmp_path / "new" / "folder")
    assert files(tmp_path) == before and not (tmp_path / "new").exists()
    assert_same_numbers(load(tmp_path), load(tmp_path))
    model.save_pretrained(tmp_path, ["a", "z"])  # the others are as good as they were


def test_too_large_for_where_it_is_loaded(tmp_path):
    """fp64 parameters are read into fp32 ones: finite here, infinite there."""
    model = adapt(net())
    with torch.no_grad():
        model.model.layers[0].q_proj.randlora_lambda["default"][0, 0] = 1e300
    with pytest.raises(
        ValueError, match=r"layers.0.q_proj.randlora_lambda.default holds .*too large for torch.float32"
    ):
        model.save_pretrained(tmp_path)
    assert not files(tmp_path)


def test_bases_that_were_given(tmp_path):
    A, B = torch.randn(4, 1, 22), torch.randn(22, 6, 4)
    model = adapt(net(), bias="none")
    for layer in model.model.modules():
        if isinstance(layer, randlora.Linear):
            layer.bases["default"] = randlora.RandomBases.from_tensors(A, B)
    model.save_pretrained(tmp_path)
    B[3, 2, 1] = math.nan
    before = files(tmp_path)
    with pytest.raises(ValueError, match="randlora_B holds NaN"):
        model.save_pretrained(tmp_path)
    assert files(tmp_path) == before


class Odd(nn.Module):
    def __init__(self, extra):
        super().__init__()
        self.register_buffer("buffer", extra if isinstance(extra, torch.Tensor) else torch.ones(1))
        self.extra = extra
        self.linear = nn.Linear(7, 7)

    def forward(self, x):
        return self.linear(x)


class WithState(Odd):
    def get_extra_state(self):
        return {"anything": 1}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: Odd(torch.full((3,), -math.inf)), "head.modules_to_save.default.buffer holds NaN, infinity"),
        (lambda: Odd(torch.ones(3).to(torch.float8_e4m3fn)), "buffer must be floating-point numbers, got torch.float8"),
        (lambda: Odd(torch.ones(3, device="meta")), "buffer is on the meta device"),
        (lambda: WithState(1), "_extra_state must be a tensor, got dict"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(tmp_path, module, message):
    model = net()
    model.head = module()
    model = adapt(model, modules_to_save=["head"])
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_integers_and_booleans_are_saved(tmp_path):
    for extra in (torch.tensor([3, -(2**60)]), torch.tensor([True, False])):
        model = net()
        model.head = Odd(extra)
        adapt(model, modules_to_save=["head"]).save_pretrained(tmp_path)
        other = net()
        other.head = Odd(torch.zeros_like(extra))
        assert torch.equal(load(tmp_path, other).model.head.modules_to_save["default"].buffer, extra)


# ---- one snapshot ----------------------------------------------------------------------------------------------------


def step(model):
    """What an optimizer does, in another thread."""

    def run():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)

    thread = threading.Thread(target=run)
    thread.start(), thread.join()


@pytest.mark.parametrize("name", ["checksum", "save_file", "replace_files", "_projections", "misread"])
def test_training_goes_on_at_any_moment(tmp_path, name, monkeypatch):
    """Before or after any part of the work: the file is whole, and holds what the model had at one moment."""
    for after in (False, True):
        model = adapted()
        old = adapted()
        new = adapted()
        step(new)

        original = getattr(writing, name)

        def wrapped(*arguments, original=original, after=after, model=model, **keywords):
            if not after:
                step(model)
            result = original(*arguments, **keywords)
            if after:
                step(model)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(writing, name, wrapped)
            model.save_pretrained(tmp_path)
        found = load(tmp_path)
        expected = new if name == "misread" else old
        assert_same_numbers(found, expected)
        head = found.model.head.modules_to_save["default"].weight
        assert torch.equal(head, expected.model.head.modules_to_save["default"].weight)
        bias = found.model.layers[0].q_proj.base_layer.bias
        assert torch.equal(bias, expected.model.layers[0].q_proj.base_layer.bias)


def test_given_bases_are_of_the_snapshot_too(tmp_path, monkeypatch):
    A, B = torch.randn(4, 1, 22), torch.randn(22, 6, 4)
    model = adapt(net())
    for layer in model.model.modules():
        if isinstance(layer, randlora.Linear):
            layer.bases["default"] = randlora.RandomBases.from_tensors(A, B)

    def wrapped(*arguments, original=writing.checksum):
        B.mul_(2)
        return original(*arguments)

    monkeypatch.setattr(writing, "checksum", wrapped)
    expected = B.clone()
    model.save_pretrained(tmp_path)
    found = load(tmp_path).model.layers[0].q_proj.bases["default"]
    assert torch.equal(found.B, expected)


def test_threads_that_train_while_it_saves(tmp_path):
    """Every number is one that the parameter had, and the file's checksum is that of its numbers."""
    model, done = adapt(net()), threading.Event()
    sizes = {name: p.detach().abs() for name, p in model.named_parameters() if p.requires_grad}

    def train():
        while not done.is_set():
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(-1)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(20):
            model.save_pretrained(tmp_path)
            loaded = {name: p.abs() for name, p in load(tmp_path).named_parameters() if name in sizes}
            assert loaded.keys() == sizes.keys() and all(torch.equal(loaded[name], sizes[name]) for name in sizes)
    finally:
        done.set()
        thread.join()


# ---- a full disk -----------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace", "rename", "mkdir", "chmod"])
@pytest.mark.parametrize("when", [1, 2])
def test_any_call_that_fails_leaves_what_was_there(tmp_path, call, when, monkeypatch):
    """Also where another alpha makes the config change: it is put back."""
    model, other = adapt(net()), adapt(net(), seed=4, randlora_alpha=9)
    for folder in (tmp_path / "old", tmp_path / "new" / "deep"):
        if folder.name == "old":
            model.save_pretrained(folder)
        before, calls, original = files(tmp_path), [], getattr(os, call)

        def failing(*arguments, original=original, calls=calls, **keywords):
            calls.append(1)
            return full() if len(calls) == when else original(*arguments, **keywords)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                other.save_pretrained(folder)
            except OSError as error:
                assert error.errno == errno.ENOSPC
            else:
                assert len(calls) < when or call == "mkdir"  # of a folder that is there
                continue
        left = files(tmp_path)
        if left != before:  # the weights were in place already: complete, and the metadata says what the config would
            assert call in ("replace", "fsync") and not (folder / CONFIG).exists()
            assert_same_numbers(load(folder), other)
        elif folder.name == "deep":
            assert not (tmp_path / "new").exists()
        assert not [p for p in tmp_path.rglob("*") if ".randlora-" in p.name]


def test_a_size_that_the_system_does_not_allow(tmp_path):
    """What safetensors makes of the system's errors is an OSError here."""
    model = adapt(net())
    model.save_pretrained(tmp_path)
    before = files(tmp_path)
    randomize(model, seed=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            model.save_pretrained(tmp_path)
        with pytest.raises(OSError, match="File too large"):
            model.save_pretrained(tmp_path / "a" / "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG and caught.value.filename.endswith(WEIGHTS)
    assert files(tmp_path) == before and not (tmp_path / "a").exists()
    assert {p.name for p in tmp_path.iterdir()} == {CONFIG, WEIGHTS, CARD}


def test_a_config_on_a_full_disk(tmp_path, monkeypatch):
    config = randlora.RandLoraConfig(target_modules=["a"])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        config.save_pretrained(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
