"""Inspects a CUDA build of randlora on a machine that needs no GPU: does it load, has every operator a CUDA kernel
that should have one, and is the machine code for every wanted architecture in it?

    python tests/check_cuda_build.py --archs sm_80 sm_90a --ptx compute_90
"""

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import randlora

# On a GPU dense products beat what leaves zeros out (randlora/planner.py): lists of non-zeros are for the CPU.
CPU_ONLY = {"randlora::sparse_up_", "randlora::sparse_down_", "randlora::sparse_gradients"}


def list_ops():
    """The qualified names, such as randlora::unique_base, of the operators that have a CPU kernel."""
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("randlora::")]
    return sorted(name for name in names if torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"))


def find_cuobjdump():
    candidates = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "cuobjdump")]
    on_path = shutil.which("cuobjdump")
    candidates += [Path(on_path)] if on_path else []
    # A CUDA torch brings triton along, which carries one: toolkits pieced together from packages may lack it.
    triton = importlib.util.find_spec("triton")
    candidates += [Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"] if triton else []
    for path in candidates:
        if os.access(path, os.X_OK):
            return path
    raise SystemExit(f"no cuobjdump in {', '.join(map(str, candidates)) or 'PATH'}; it is part of the CUDA toolkit")


def list_code(cuobjdump):
    """The architectures of the binary's machine code ("elf") and PTX ("ptx"), both named sm_*."""
    # Not --list-elf: versions of cuobjdump differ in whether it tells sm_90a from sm_90.
    command = [str(cuobjdump), randlora._C.__file__]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {"elf": set(), "ptx": set()}
    for kind, arch in re.findall(r"Fatbin (elf|ptx) code:\n=+\narch = (\w+)", output):
        found[kind].add(arch.replace("compute_", "sm_"))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--archs", nargs="*", default=[], help="machine code that must be there, such as sm_80")
    parser.add_argument("--ptx", nargs="*", default=[], help="PTX that must be there, such as compute_90")
    arguments = parser.parse_args()
    problems = []

    print("built with:", ", ".join(f"{key} {value}" for key, value in randlora.build_info().items()))
    print(f"{torch.cuda.device_count()} GPUs are visible to torch {torch.__version__} (CUDA {torch.version.cuda})")

    ops = list_ops()
    if not ops:
        problems.append("no operator in torch.ops.randlora has a CPU kernel")
    for name in ops:
        has_cuda = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        print(f"{name}: CPU kernel, {'CUDA kernel' if has_cuda else 'NO CUDA kernel'}")
        if has_cuda == (name in CPU_ONLY):
            problems.append(f"{name} has a CPU kernel {'and a CUDA kernel, too' if has_cuda else 'but no CUDA kernel'}")

    code = list_code(find_cuobjdump())
    wanted_ptx = [arch.replace("compute_", "sm_") for arch in arguments.ptx]
    for kind, found, wanted in (("machine code", code["elf"], arguments.archs), ("PTX", code["ptx"], wanted_ptx)):
        print(f"{kind}: {', '.join(sorted(found)) or 'none'}")
        problems += [f"{arch} {kind} is missing from {randlora._C.__file__}" for arch in wanted if arch not in found]

    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
