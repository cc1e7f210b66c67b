"""Builds `randlora._C`. The package is described in pyproject.toml, the sources are listed in csrc/sources.txt.

Environment variables:
    RANDLORA_CUDA         unset: build the CUDA kernels if nvcc and a CUDA torch are there, with or without a visible
                          GPU; 1: demand them; 0: leave them out
    TORCH_CUDA_ARCH_LIST  GPU architectures, as everywhere in PyTorch; "native" means the GPUs of this machine
    CUDA_HOME             the CUDA toolkit, where it is neither on PATH nor in /usr/local/cuda
    MAX_JOBS              how many files to compile at once
    RANDLORA_SANITIZE     1: with AddressSanitizer and UndefinedBehaviorSanitizer, for "make asan"
"""

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent

# The source fits every PyTorch from this one on; a binary fits the minor version that it was compiled against.
TORCH = "torch>=2.10"
REQUIREMENTS = [
    "safetensors>=0.4.3",
    "regex",  # can stop matching, which re cannot
    "numpy",  # safetensors.torch.save_file needs it and does not ask for it
]

# sm_80 code runs on every Ampere and Ada GPU, sm_90a is Hopper with all its instructions, and the PTX of compute_90
# is compiled by the driver on anything newer.
DEFAULT_ARCHS = "8.0;9.0a;9.0+PTX"

# The process ends at the first error.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


class CudaMissing(Exception):
    """Why the CUDA kernels cannot be built: one sentence without the full stop."""


def read_sources(with_cuda):
    lines = (ROOT / "csrc" / "sources.txt").read_text().splitlines()
    names = [line.partition("#")[0].strip() for line in lines]
    return [f"csrc/{name}" for name in names if name and (with_cuda or not name.endswith(".cu"))]


def has_toolkit(home):
    # A wrapper script such as /usr/local/bin/nvcc has no headers beside it, so nvcc alone proves nothing.
    headers = [*home.glob("include/cuda_runtime.h"), *home.glob("targets/*/include/cuda_runtime.h")]
    return (home / "bin" / "nvcc").is_file() and bool(headers)


def find_toolkit(environ):
    """The folder that holds bin/nvcc and the CUDA headers."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            home = Path(environ[variable])
            if has_toolkit(home):
                return home
            raise CudaMissing(f"{variable} is {home}, which lacks bin/nvcc or include/cuda_runtime.h")
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    on_path = [Path(nvcc).parent.parent, Path(nvcc).resolve().parent.parent] if nvcc else []
    for home in [*on_path, Path("/usr/local/cuda")]:
        if has_toolkit(home):
            return home
    raise CudaMissing(
        "no CUDA toolkit (nvcc and its headers) was found through CUDA_HOME, on PATH or in /usr/local/cuda"
    )


def toolkit_version(home, torch_version, torch_cuda):
    """The version of a toolkit that suits this torch: the same major version."""
    output = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+\.\d+)", output)
    if release is None or release[1].split(".")[0] != torch_cuda.split(".")[0]:
        found = f"CUDA {release[1]}" if release else "of an unknown version"
        raise CudaMissing(f"torch {torch_version} needs a CUDA {torch_cuda} toolkit, but the one in {home} is {found}")
    return release[1]


def choose_toolkit(environ, torch_version, torch_cuda):
    """(folder, version, None) of the CUDA toolkit to build with, or (None, None, reason) for a CPU-only build.

    SystemExit where the reason collides with what the user asked for.
    """
    wish = environ.get("RANDLORA_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"randlora: RANDLORA_CUDA must be 1, 0 or unset, got {wish!r}.")
    if wish == "0":
        return None, None, "RANDLORA_CUDA=0 asked for it"
    try:
        if torch_cuda is None:
            raise CudaMissing(f"torch {torch_version} is a build without CUDA")
        home = find_toolkit(environ)
        version = toolkit_version(home, torch_version, torch_cuda)
    except CudaMissing as missing:
        if wish == "1":
            raise SystemExit(f"randlora: RANDLORA_CUDA=1 demands the CUDA kernels, but {missing}.") from None
        return None, None, str(missing)
    return home, version, None


def choose_archs(environ):
    archs = environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHS
    if archs == "native":
        import torch

        gpus = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        if not gpus:
            raise SystemExit(
                "randlora: TORCH_CUDA_ARCH_LIST=native needs a visible GPU; give a list such as '8.0;9.0'."
            )
        archs = ";".join(f"{major}.{minor}" for major, minor in sorted(gpus))
    return archs


class NeedsTorch(build_ext):
    """Stands in while there is no torch: metadata and an sdist can be made without it, a binary cannot."""

    def run(self):
        raise SystemExit(
            "randlora: the extension is built against the installed torch, and there is none; install torch first."
        )


def extension_with_torch():
    import torch

    toolkit, cuda_version, cpu_only_because = choose_toolkit(os.environ, torch.__version__, torch.version.cuda)
    archs = ""
    if toolkit:
        # cpp_extension reads CUDA_HOME when it is imported, and would take any nvcc on PATH for a toolkit.
        os.environ["CUDA_HOME"] = str(toolkit)
        archs = os.environ["TORCH_CUDA_ARCH_LIST"] = choose_archs(os.environ)
    elif torch.version.cuda and os.environ.get("RANDLORA_CUDA") != "0":
        print(f"randlora: building for the CPU only: {cpu_only_because}.", flush=True)

    from torch.utils import cpp_extension

    make = cpp_extension.CUDAExtension if toolkit else cpp_extension.CppExtension
    extension = make(
        "randlora._C",
        read_sources(with_cuda=bool(toolkit)),
        define_macros=[
            # On every command line, so that a new torch in the same place compiles everything anew.
            ("RANDLORA_TORCH_VERSION", f'"{torch.__version__}"'),
            ("RANDLORA_CUDA_ARCHS", f'"{archs}"'),
            ("RANDLORA_CUDA_VERSION", f'"{cuda_version or ""}"'),
            *([("RANDLORA_WITH_CUDA", None)] if toolkit else []),
        ],
    )
    # -g0: Python's own flags often ask for debug information, most of it PyTorch's templates.
    # -isystem: warnings about our code only. nvcc keeps -I, where cpp_extension put the same folders: it mistakes
    # any flag with "arch" in it, such as a path, for a choice of architectures.
    system = [flag for folder in extension.include_dirs for flag in ("-isystem", folder)]
    extension.extra_compile_args = {
        # at::parallel_for is a serial loop without -fopenmp. Not for the linker: the runtime is torch's own.
        "cxx": ["-O3", "-fopenmp", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", *system],
        "nvcc": ["-O3", "-lineinfo", "-Xcompiler", "-fvisibility=hidden"],
    }
    extension.include_dirs.insert(0, str(ROOT / "csrc"))
    sanitize = os.environ.get("RANDLORA_SANITIZE") == "1"
    if sanitize:
        extension.extra_compile_args["cxx"] += ["-O1", "-g1", *SANITIZERS]
        extension.extra_link_args += SANITIZERS

    class Build(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # One folder of objects for each Python and torch, since every environment that builds this checkout shares
            # build/; kept for editable installs too, for which setuptools would take a temporary folder. Linking is
            # always done anew, compiling only where something changed: ninja knows.
            tag = f"{sys.implementation.cache_tag}-torch-{torch.__version__}-{'cuda' if toolkit else 'cpu'}"
            tag += "-sanitized" if sanitize else ""
            self.build_temp = str(ROOT / "build" / "objects" / tag)
            self.force = True

        def build_extension(self, ext):
            ext.define_macros.append(("RANDLORA_VERSION", f'"{self.distribution.get_version()}"'))
            super().build_extension(ext)
            self.write_record(Path(self.build_lib))

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            self.write_record(ROOT)

        def write_record(self, package_root):
            """What the binary was built with, for randlora/_load.py to read before it loads the binary."""
            compiler = subprocess.run([cpp_extension.get_cxx_compiler(), "--version"], capture_output=True, text=True)
            record = {
                "randlora": self.distribution.get_version(),
                "torch": str(torch.__version__),
                "cuda": cuda_version,
                "cuda_archs": archs or None,
                "cpu_only_because": cpu_only_because,
                "python": platform.python_version(),
                "compiler": compiler.stdout.partition("\n")[0],
            }
            path = package_root / "randlora" / "_build.json"
            path.write_text(json.dumps(record, indent=2) + "\n")

    return extension, Build


def torch_requirement(version, command):
    """What an sdist, or a binary built against torch `version`, requires; `command` is what setup.py was told to do."""
    if version is None or "sdist" in command:
        return TORCH
    return f"torch=={'.'.join(version.split('.')[:2])}.*"


def main():
    version = None
    if importlib.util.find_spec("torch") is None:
        extension, command = Extension("randlora._C", read_sources(with_cuda=False)), NeedsTorch
    else:
        extension, command = extension_with_torch()
        import torch

        version = torch.__version__
    setup(
        ext_modules=[extension],
        cmdclass={"build_ext": command},
        install_requires=[torch_requirement(version, sys.argv[1:]), *REQUIREMENTS],
        license="Apache-2.0",
    )


if __name__ == "__main__":
    main()
