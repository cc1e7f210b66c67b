"""PEP 517 backend: setuptools.build_meta, building against the torch that the extension will be loaded with.

A C++ extension works with the torch it was built against and no other, so listing torch in `build-system.requires`
would be wrong: pip would put the newest torch into the isolated build, and the result would not load. Instead:

- pip's isolation runs the environment's interpreter with a few paths put in front. Appending the environment's
  site-packages to `sys.path` brings its torch into view.
- `python -m build` makes an environment of its own, where there is no torch to see. There, torch becomes a build
  requirement, and the wheel fits that version.
- uv does the same, but installs the wheel into an environment whose torch may be another one. There, one sentence
  says what to type.
"""

import importlib.util
import os
import site
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import build_meta
from setuptools.build_meta import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

TORCH_REQUIREMENT = "torch>=2.10"

UV_MESSAGE = (
    "randlora: uv builds in an isolated environment, where the torch of your environment cannot be seen. "
    "Type: uv pip install setuptools wheel ninja torch && uv pip install --no-build-isolation . "
    "(with -e before the dot for an editable install)."
)

WHEEL_MESSAGE = (
    "randlora: setuptools {version} needs the package 'wheel' to build this, and it is not installed. "
    "Type: pip install --upgrade setuptools wheel ninja"
)


def _read_pyvenv_cfg():
    """The keys of this virtual environment's pyvenv.cfg; empty outside one."""
    path = Path(sys.prefix, "pyvenv.cfg")
    if not path.is_file():
        return {}
    pairs = (line.partition("=") for line in path.read_text().splitlines())
    return {key.strip().lower(): value.strip() for key, _, value in pairs}


def _environment_paths():
    """Where the environment that runs this interpreter keeps its packages, in the order it would search them."""
    in_venv = sys.prefix != sys.base_prefix
    paths = [] if in_venv else [site.getusersitepackages()]
    paths += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if not in_venv or _read_pyvenv_cfg().get("include-system-site-packages") == "true":
        paths += site.getsitepackages([sys.base_prefix])
    return paths


def _torch_is_importable():
    importlib.invalidate_caches()
    return importlib.util.find_spec("torch") is not None


def _see_environment():
    """Make the environment's packages importable, after everything the frontend put first. True if torch is there."""
    if not _torch_is_importable():
        sys.path += [path for path in dict.fromkeys(_environment_paths()) if path not in sys.path]
    return _torch_is_importable()


def _is_uv_isolation():
    # uv makes its build environments below "<cache>/builds-v<N>/"; newer versions also tell the hooks where.
    # A virtual environment made by uv carries the key too, so the key alone proves nothing.
    if "uv" not in _read_pyvenv_cfg():
        return False
    below_cache = any(part.startswith("builds-v") for part in Path(sys.prefix).parts)
    return below_cache or "UV_INTERNAL__BUILD_DIR" in os.environ


def _require_torch_in_view():
    if not _see_environment() and _is_uv_isolation():
        raise SystemExit(UV_MESSAGE)


def _require_wheel():
    version = tuple(int(part) for part in setuptools.__version__.split(".")[:2])
    if version < (70, 1) and importlib.util.find_spec("wheel") is None:
        raise SystemExit(WHEEL_MESSAGE.format(version=setuptools.__version__))


def _with_torch(requirements):
    _require_torch_in_view()
    return requirements if _torch_is_importable() else [*requirements, TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings=None):
    return _with_torch(build_meta.get_requires_for_build_editable(config_settings))


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _require_torch_in_view()
    _require_wheel()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _require_torch_in_view()
    _require_wheel()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _require_torch_in_view()
    _require_wheel()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _require_torch_in_view()
    _require_wheel()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
