"""Bit flips, cuts, random edits and absurd sizes: right numbers, or an error that names the file, and little memory."""

import json
import math
import shutil
import struct
import warnings

import pytest
import torch
from helpers.damaged import (
    CONFIG,
    TARGETS,
    WEIGHTS,
    assert_refused,
    edit_config,
    read_header,
    write_header,
)
from helpers.memory import little_memory
from helpers.models import adapt, assert_unchanged, net, snapshot
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from randlora.checkpoint import reading

# ---- truncated and bit flips -----------------------------------------------------------------------------------------


def test_truncated_at_every_kind_of_place(folder):
    data = (folder / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, (header + len(data)) // 2, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:size])
        assert_refused(folder, "no readable safetensors file")
    (folder / WEIGHTS).write_bytes(data + b"\0")
    assert_refused(folder, "no readable safetensors file")
    (folder / WEIGHTS).write_bytes(bytes(len(data)))
    assert_refused(folder, "no readable safetensors file")


def outcome(model, folder):
    """What reading gives: None if it is refused in the right way, else the tensors; anything else fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loaded = reading.read(model, folder)
        except ValueError as error:
            assert type(error) is ValueError and str(folder) in str(error), repr(error)
            return None
    found = {(slot, part): t for slot, parts in loaded.parameters.items() for part, t in parts.items()}
    found |= {(name, key): t for name, state in loaded.saved.items() for key, t in state.items()}
    found |= dict(loaded.biases)
    # The process may have larger bases of this definition already, of which these are a part.
    bases, (max_dim, min_dim, num_bases) = loaded.plan.bases.to(torch.float32), loaded.plan.required()
    found |= {"A": bases.A[..., :min_dim], "B": bases.B[:max_dim, :num_bases]}
    assert all(torch.isfinite(t).all() and t.is_floating_point() for t in found.values())
    for slot, (i, o) in loaded.plan.slots.items():
        n = math.ceil(min(i, o) / loaded.plan.config.r)
        assert found[slot, "randlora_lambda"].shape == (loaded.plan.config.r, n)
        assert found[slot, "randlora_gamma"].shape == (n, min(i, o))
    return {key: t.clone() for key, t in found.items()}


@pytest.mark.parametrize("name", ["ours", "ours_small", "peft", "peft_small"])
def test_every_byte_of_the_header(folders, tmp_path, name):
    """Ours loads with the very same numbers, if at all (white space); PEFT's has no checksum to go by."""
    folder = shutil.copytree(folders / name, tmp_path / "adapter")
    model, data = net(), bytearray((folder / WEIGHTS).read_bytes())
    before, good = snapshot(model), outcome(model, folder)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    loaded = 0
    for place in range(0, header, 2 if "small" in name else 5):
        changed = data.copy()
        changed[place] ^= 1 << place * 7 % 8
        (folder / WEIGHTS).write_bytes(changed)
        got = outcome(model, folder)
        loaded += got is not None
        if got is not None and "ours" in name:
            assert all(torch.equal(t, good[key]) for key, t in got.items()), place
    assert loaded < header / 20
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["ours", "ours_small"])
def test_every_tensor_has_its_checksum(folders, tmp_path, name):
    folder = shutil.copytree(folders / name, tmp_path / "adapter")
    data = (folder / WEIGHTS).read_bytes()
    header, tensors = read_header(folder / WEIGHTS)
    start = len(data) - len(tensors)
    del header["__metadata__"]
    for key, entry in header.items():
        if "randlora_A" in key or "randlora_B" in key:
            continue  # not read: they are made again, and the fingerprint proves them
        place = start + entry["data_offsets"][0]
        (folder / WEIGHTS).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(ValueError, match="its checksum does not match"):
            reading.read(net(), folder)


changes = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=16)),
    st.tuples(st.just("repeat"), st.floats(0, 1), st.integers(1, 200)),
    st.tuples(
        st.just("write"), st.floats(0, 1), st.sampled_from([b'"', b"{}", b"null", b"F64", b"1e999", b"\xff" * 8])
    ),
)


def corrupt(data, steps):
    data = bytearray(data)
    for kind, where, value in steps:
        place = int(where * max(len(data) - 1, 0))
        if kind == "flip" and data:
            data[place] ^= value
        elif kind == "cut":
            del data[place : place + value]
        elif kind == "insert":
            data[place:place] = value
        elif kind == "repeat":
            data[place:place] = data[place : place + value]
        elif kind == "write":
            data[place : place + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize("name", ["ours", "peft"])
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    weights=st.lists(changes, max_size=3),
    config=st.lists(changes, max_size=2),
    in_header=st.booleans(),
)
@example(weights=[], config=[], in_header=False)
def test_fuzz(folders, tmp_path_factory, name, weights, config, in_header):
    folder = tmp_path_factory.getbasetemp() / f"fuzz {name}"
    if not folder.exists():
        shutil.copytree(folders / name, folder)
    data = (folders / name / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    if in_header:  # with a length that fits, so that what it says is read
        text = corrupt(data[8:header], weights)
        changed = struct.pack("<Q", len(text)) + text + data[header:]
    else:
        changed = corrupt(data, weights)
    (folder / WEIGHTS).write_bytes(changed)
    (folder / CONFIG).write_bytes(corrupt((folders / name / CONFIG).read_bytes(), config))
    model = FUZZED
    got = outcome(model, folder)
    if got is not None and name == "ours":
        good = outcome(model, folders / name)
        assert got.keys() == good.keys() and all(torch.equal(t, good[key]) for key, t in got.items())
    assert_unchanged(model, FUZZED_BEFORE)


FUZZED = net()
FUZZED_BEFORE = snapshot(FUZZED)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@pytest.mark.parametrize("name", ["ours_small", "peft"])
@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_fuzzed_settings(folders, tmp_path_factory, name, data):
    folder = tmp_path_factory.getbasetemp() / f"fuzz settings {name}"
    if not folder.exists():
        shutil.copytree(folders / name, folder)
    values = json.loads((folders / name / CONFIG).read_text())
    keys = st.sampled_from([*values, "kind", "num_bases", "prng", "sparsity", "strategy", "exclude_modules"])
    changes = data.draw(st.dictionaries(keys, json_values, min_size=1, max_size=2))
    (folder / CONFIG).write_text(json.dumps(values | changes))
    if (got := outcome(FUZZED, folder)) is not None and name == "ours_small":
        good = outcome(FUZZED, folders / name)
        assert got.keys() == good.keys() and all(torch.equal(t, good[key]) for key, t in got.items())
    assert_unchanged(FUZZED, FUZZED_BEFORE)


# ---- absurd sizes ----------------------------------------------------------------------------------------------------


def test_absurd_sizes_take_no_memory(folder, peft_folder):
    data = (folder / WEIGHTS).read_bytes()
    header, tensors = read_header(folder / WEIGHTS)
    with little_memory():
        for size in (2**63, 2**64 - 1, 2**62, 2**40, 100 << 20, (100 << 20) + 1, 2**31):
            (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])
            assert_refused(folder, "no readable safetensors file")
        with open(folder / WEIGHTS, "wb") as file:  # the header is there, all of its 90 MB
            file.write(struct.pack("<Q", 90 << 20))
            file.truncate(91 << 20)
        assert_refused(folder, "no readable safetensors file")
        key = next(key for key in header if "lambda" in key)
        for shape in ([2**40], [2**32, 2**32], [0], [-1], [], [2**63] * 9, [1e9]):
            header[key]["shape"] = shape
            write_header(folder / WEIGHTS, header, tensors)
            assert_refused(folder, ".")
        write_header(folder / WEIGHTS, b"[" * (1 << 20), tensors)
        assert_refused(folder, "no readable safetensors file")
        (folder / CONFIG).write_text("[" * (1 << 20))
        (folder / WEIGHTS).write_bytes(data)
        assert_refused(folder, "no valid JSON")
        for changes in ({"r": 10**12}, {"r": 10**400}, {"layers_to_transform": [10**18]}, {"sparsity": 1e308}):
            shutil.copy(peft_folder / CONFIG, peft_folder / "kept")
            edit_config(peft_folder, **changes)
            assert_refused(peft_folder, ".")
            shutil.copy(peft_folder / "kept", peft_folder / CONFIG)


def test_the_shared_bases_do_not_grow_for_a_file_that_is_refused(folder):
    model = adapt(net(), **TARGETS)
    bases = model.model.layers[0].q_proj.bases["default"]
    before = bases.max_dim, bases.min_dim, bases.num_bases
    header, tensors = read_header(folder / WEIGHTS)
    said = json.loads(header["__metadata__"]["randlora"])
    said["config"]["num_bases"], said["dims"] = 60_000, [60_000, 60_000, 60_000]
    header["__metadata__"]["randlora"] = json.dumps(said)
    write_header(folder / WEIGHTS, header, tensors)
    with pytest.raises(ValueError, match=r"must have shape|do not belong together"):
        model.load_adapter(folder, "b")
    assert (bases.max_dim, bases.min_dim, bases.num_bases) == before
