"""Building and loading: what is said when it cannot work. No compiler runs here."""

import importlib.util
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from randlora import _load

ROOT = Path(__file__).resolve().parents[1]


def import_from(path, monkeypatch=None):
    spec = importlib.util.spec_from_file_location(f"under_test_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def setup_py():
    return import_from(ROOT / "setup.py")


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    return import_from(ROOT / "build_backend" / "randlora_build_backend.py")


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    """Writes a _build.json as the build would, with some entries replaced."""

    def write(**changes):
        path = tmp_path / "_build.json"
        path.write_text(json.dumps({"torch": torch.__version__, "python": "3.11.7", **changes}))
        return path

    return write


def test_load_returns_the_compiled_module():
    assert _load.load().__name__ == "randlora._C"


def test_record_describes_this_build():
    record = json.loads(_load.BUILD_RECORD.read_text())
    assert record["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert set(record) == {"randlora", "torch", "cuda", "cuda_archs", "cpu_only_because", "python", "compiler"}
    assert (record["cuda"] is None) == (record["cpu_only_because"] is not None)


def test_missing_binary_names_torch_and_the_command(tmp_path):
    with pytest.raises(ImportError, match="no compiled part") as caught:
        _load.load(tmp_path / "_build.json")
    assert f"torch {torch.__version__} is installed" in str(caught.value)
    assert "pip install" in str(caught.value)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


@pytest.mark.parametrize("text", ["", "{}", "[]", "not json"])
def test_unreadable_record(tmp_path, text):
    path = tmp_path / "_build.json"
    path.write_text(text)
    with pytest.raises(ImportError, match="does not say which torch") as caught:
        _load.load(path)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("built", ["1.13.1", "2.1.0+cu118", "3.0.0"])
def test_other_torch_is_refused_before_the_binary_is_touched(record, monkeypatch, built):
    monkeypatch.setattr(_load.importlib, "import_module", lambda name: pytest.fail("the binary was loaded"))
    with pytest.raises(ImportError) as caught:
        _load.load(record(torch=built))
    assert f"built against torch {built}" in str(caught.value)
    assert f"torch {torch.__version__} is installed" in str(caught.value)
    assert "pip install" in str(caught.value)


def test_patch_releases_and_local_versions_are_compatible(record):
    major, minor = torch.__version__.split(".")[:2]
    assert _load.load(record(torch=f"{major}.{minor}.99+other")).__name__ == "randlora._C"


def test_failing_dlopen_is_explained_and_chained(record, monkeypatch):
    original = ImportError("libc10_cuda.so: cannot open shared object file")

    def fail(name):
        raise original

    monkeypatch.setattr(_load.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r"libc10_cuda\.so") as caught:
        _load.load(record(python="3.99.0"))
    message = str(caught.value)
    assert f"torch {torch.__version__}" in message and "Python 3.99.0" in message and "pip install" in message
    assert caught.value.__cause__ is original


def test_missing_torch(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"needs PyTorch 2\.10"):
        _load.load(record())


def test_cure_in_a_checkout_is_an_editable_install():
    assert f"-e {ROOT}" in _load._cure(ROOT / "randlora")


def test_cure_outside_names_the_folder_it_was_installed_from(monkeypatch, tmp_path):
    (tmp_path / "setup.py").touch()
    source = SimpleNamespace(read_text=lambda name: json.dumps({"url": tmp_path.as_uri(), "dir_info": {}}))
    monkeypatch.setattr(_load.metadata, "distribution", lambda name: source)
    assert _load._cure(tmp_path / "site-packages" / "randlora").endswith(f"--no-deps {tmp_path}")


def test_cure_without_a_folder_avoids_cached_wheels(monkeypatch, tmp_path):
    monkeypatch.setattr(_load.metadata, "distribution", lambda name: SimpleNamespace(read_text=lambda name: None))
    assert "--no-cache-dir randlora" in _load._cure(tmp_path / "site-packages" / "randlora")


# --- setup.py --------------------------------------------------------------------------------------------------------


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like a CUDA 13.0 toolkit."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    return home


def test_sources_exist_and_cuda_is_separate(setup_py):
    with_cuda, without = setup_py.read_sources(True), setup_py.read_sources(False)
    assert all((ROOT / name).is_file() for name in with_cuda)
    assert [name for name in with_cuda if not name.endswith(".cu")] == without
    assert len(with_cuda) > len(without) > 0


def test_every_source_is_listed(setup_py):
    on_disk = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in {".cpp", ".cu"}}
    assert on_disk == set(setup_py.read_sources(True))


@pytest.mark.parametrize("wish", ["", "1"])
def test_cuda_is_built_without_a_visible_gpu(setup_py, toolkit, wish):
    environ = {"CUDA_HOME": str(toolkit), "RANDLORA_CUDA": wish, "CUDA_VISIBLE_DEVICES": ""}
    assert setup_py.choose_toolkit(environ, "2.11.0", "13.0") == (toolkit, "13.0", None)


def test_zero_refuses_cuda(setup_py, toolkit):
    environ = {"CUDA_HOME": str(toolkit), "RANDLORA_CUDA": "0"}
    assert setup_py.choose_toolkit(environ, "2.11.0", "13.0") == (None, None, "RANDLORA_CUDA=0 asked for it")


def test_another_wish_is_an_error(setup_py):
    with pytest.raises(SystemExit, match="must be 1, 0 or unset, got 'yes'"):
        setup_py.choose_toolkit({"RANDLORA_CUDA": "yes"}, "2.11.0", "13.0")


@pytest.mark.parametrize(
    ("home", "torch_cuda", "missing"),
    [
        ("toolkit", None, "torch 2.11.0 is a build without CUDA"),
        ("nowhere", "13.0", "CUDA_HOME is .*nowhere, which lacks bin/nvcc"),
        ("toolkit", "12.8", r"torch 2\.11\.0 needs a CUDA 12\.8 toolkit, but the one in .* is CUDA 13\.0"),
    ],
    ids=["cpu-torch", "no-nvcc", "other-cuda"],
)
def test_what_is_missing_for_cuda(setup_py, toolkit, home, torch_cuda, missing):
    environ = {"CUDA_HOME": str(toolkit if home == "toolkit" else toolkit.parent / home)}
    folder, version, reason = setup_py.choose_toolkit(environ, "2.11.0", torch_cuda)
    assert (folder, version) == (None, None)
    with pytest.raises(SystemExit, match=f"RANDLORA_CUDA=1 demands the CUDA kernels, but {missing}") as caught:
        setup_py.choose_toolkit({**environ, "RANDLORA_CUDA": "1"}, "2.11.0", torch_cuda)
    assert reason in str(caught.value)


def test_nvcc_on_path_counts_only_with_its_headers(setup_py, toolkit, tmp_path):
    assert setup_py.find_toolkit({"PATH": str(toolkit / "bin")}) == toolkit
    wrapper = tmp_path / "bin" / "nvcc"  # such as a script in /usr/local/bin
    wrapper.parent.mkdir()
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    assert not setup_py.has_toolkit(tmp_path)


def test_archs(setup_py):
    assert setup_py.choose_archs({}) == setup_py.DEFAULT_ARCHS
    assert "+PTX" in setup_py.DEFAULT_ARCHS
    assert setup_py.choose_archs({"TORCH_CUDA_ARCH_LIST": "8.6"}) == "8.6"


@pytest.mark.parametrize(
    ("torch_version", "command", "requirement"),
    [
        ("2.13.0+cpu", ["bdist_wheel"], "torch==2.13.*"),
        ("2.10.1", ["editable_wheel"], "torch==2.10.*"),
        ("2.14.0.dev20261126+cu130", ["dist_info"], "torch==2.14.*"),
        ("2.13.0", ["sdist"], "torch>=2.10"),
        (None, ["sdist"], "torch>=2.10"),
        (None, ["egg_info"], "torch>=2.10"),
    ],
)
def test_a_binary_requires_the_torch_it_was_built_against(setup_py, torch_version, command, requirement):
    assert setup_py.torch_requirement(torch_version, command) == requirement


# --- the build backend -----------------------------------------------------------------------------------------------


def test_torch_in_view_is_not_a_requirement(backend):
    assert not any("torch" in requirement for requirement in backend._with_torch(["setuptools"]))


def test_torch_is_required_where_there_is_none(backend, monkeypatch):
    monkeypatch.setattr(backend, "_torch_is_importable", lambda: False)
    monkeypatch.setattr(backend, "_is_uv_isolation", lambda: False)
    assert backend.TORCH_REQUIREMENT in backend._with_torch([])


def test_the_oldest_torch_is_the_same_everywhere(backend, setup_py):
    assert backend.TORCH_REQUIREMENT == setup_py.TORCH
    assert f"needs PyTorch {setup_py.TORCH.partition('>=')[2]} or newer" in inspect.getsource(_load.load)


def test_an_sdist_needs_no_torch(backend):
    assert backend.get_requires_for_build_sdist is backend.build_meta.get_requires_for_build_sdist


def test_uv_isolation_is_told_what_to_type(backend, monkeypatch):
    monkeypatch.setattr(backend, "_torch_is_importable", lambda: False)
    monkeypatch.setattr(backend, "_read_pyvenv_cfg", lambda: {"uv": "0.9.0"})
    monkeypatch.setattr(sys, "prefix", "/home/user/.cache/uv/builds-v0/.tmpAbCdEf")
    with pytest.raises(SystemExit, match=r"uv pip install --no-build-isolation \."):
        backend._with_torch([])


def test_an_environment_made_by_uv_is_not_its_isolation(backend, monkeypatch):
    monkeypatch.setattr(backend, "_read_pyvenv_cfg", lambda: {"uv": "0.9.0"})
    monkeypatch.setattr(sys, "prefix", "/home/user/project/.venv")
    monkeypatch.delenv("UV_INTERNAL__BUILD_DIR", raising=False)
    assert not backend._is_uv_isolation()


def test_the_environments_packages_come_last(backend, monkeypatch):
    monkeypatch.setattr(sys, "path", ["first"])
    answers = iter([False, True])
    monkeypatch.setattr(backend, "_torch_is_importable", lambda: next(answers))
    assert backend._see_environment()
    assert sys.path[0] == "first" and backend.sysconfig.get_path("purelib") in sys.path[1:]


def test_old_setuptools_without_wheel(backend, monkeypatch):
    monkeypatch.setattr(backend.setuptools, "__version__", "65.5.0")
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"setuptools 65\.5\.0 needs the package 'wheel'"):
        backend._require_wheel()
