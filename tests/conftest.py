"""Settings that every test shares."""

import os

import pytest
import torch

import randlora


def _why_no_cuda():
    """The reason why tests marked `cuda` cannot run here, or None."""
    if not torch.cuda.is_available():
        return f"no CUDA device is visible to torch {torch.__version__}"
    if not randlora.build_info()["cuda"]:
        return "a CUDA device is there, but this randlora was built without CUDA (see RANDLORA_CUDA in setup.py)"
    return None


def pytest_configure(config):
    # With -p no:faulthandler: what the stack of the binary was where a test ends the process, not only that of Python.
    if os.environ.get("RANDLORA_NATIVE_TRACES") == "1":
        torch._C._set_print_stack_traces_on_fatal_signal(True)


def pytest_report_header(config):
    info = ", ".join(f"{key} {value}" for key, value in randlora.build_info().items())
    return [f"randlora: {randlora.__file__}", f"built with: {info}"]


# Files with few tests that take long: first, so that no process has one of them to do while all others have ended.
LONG = (
    "test_examples", "test_sdist", "test_gpu_script", "test_fuzz", "test_quiet", "test_types", "test_memory",
    "test_imports",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.stem not in LONG)
    reason = _why_no_cuda()
    if reason is None:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if item.get_closest_marker("cuda"):  # not in item.keywords, where parameters called "cuda" are, too
            item.add_marker(skip)


def _modes():
    """The modes of torch that this thread is in; dispatch keys stand for some, such as that of torch.func."""
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype(), *map(repr, keys)


@pytest.fixture(autouse=True)
def precision_is_left_as_it_was(monkeypatch):
    """With ``bf16=True`` TrainingArguments of transformers 4 leave this set, for all that the process trains later."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


@pytest.fixture(autouse=True)
def modes_are_left_as_they_were():
    """A mode that a test leaves on would fail the tests after it, which have nothing to do with it."""
    before = _modes()
    yield
    after = _modes()
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[2])
    assert after == before, "(gradients, inference mode, default dtype, dispatch keys included, and excluded)"
