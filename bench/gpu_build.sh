#!/usr/bin/env bash
# Builds randlora for a machine with a Hopper GPU on one that needs no GPU: a wheel in .gpu/, which git ignores and
# bench/gpu.sh installs in seconds. Copied along with the checkout it spares the GPU's machine the compiler.
#
#   bench/gpu_build.sh
#
# Python and torch must be those of the GPU's machine (PYTHON, default python3.12; TORCH, default torch==2.11.0 with
# CUDA 13.0, a download of 2 GB and more), and nvcc of torch's CUDA version (CUDA_HOME, default /usr/local/cuda).
# QUANTIZERS names the packages that quantise layers (default: bitsandbytes and torchao of the versions that were tested).
# TORCH_CUDA_ARCH_LIST (default 9.0a) and MAX_JOBS (default 1) as everywhere. The binary runs where the C library and
# libstdc++ are as new as here: the last lines say which versions it asks for.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=${TORCH:-torch==2.11.0}
venv=${VENV:-.venv-gpu}
read -ra quantizers <<<"${QUANTIZERS:-bitsandbytes==0.50.2 torchao==0.18.0}"
export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda} RANDLORA_CUDA=1 MAX_JOBS=${MAX_JOBS:-1}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a}

[[ -x $venv/bin/python ]] || "${PYTHON:-python3.12}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install --quiet "$torch" 'setuptools>=70.1' wheel ninja numpy safetensors regex

rm -rf build/lib* .gpu
pip wheel --no-build-isolation --no-deps --wheel-dir .gpu .
# What the binary was compiled from, for bench/gpu.sh to compare; Python files may change after the build.
find csrc setup.py -type f | LC_ALL=C sort | xargs sha256sum >.gpu/sources.sha256
{ git rev-parse --short=10 HEAD 2>/dev/null || echo unknown; } >.gpu/commit

# What quantises layers, for "bench/gpu.sh forms". Only these two packages: all that they need is there. Of their binaries
# only bitsandbytes' for this version of CUDA is used: torchao's products with int8 and int4 are PyTorch's own. Without
# them that call has rows that say so.
packages=.gpu/packages
if pip install --quiet --no-deps --no-compile --target "$packages" "${quantizers[@]}"; then
  cuda=$("$venv/bin/python" -c 'import torch; print(torch.version.cuda.replace(".", ""))')
  find "$packages" -mindepth 1 -maxdepth 1 ! -name 'bitsandbytes*' ! -name 'torchao*' -exec rm -rf {} +
  find "$packages" -name '*.so' ! -name "libbitsandbytes_cuda$cuda.so" ! -name libbitsandbytes_cpu.so -delete
  [[ -f $packages/bitsandbytes/libbitsandbytes_cuda$cuda.so ]] ||
    echo "warning: this bitsandbytes has nothing for CUDA $cuda" >&2
else
  rm -rf "$packages"
  echo "warning: ${quantizers[*]} cannot be had: quantised layers will not be measured" >&2
fi

# Installed as bench/gpu.sh does it, loaded and looked into.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
pip install --quiet --no-index --no-deps --target "$site" .gpu/*.whl
archs=$(tr ';' ' ' <<<"$TORCH_CUDA_ARCH_LIST")
# shellcheck disable=SC2046,SC2086  # lists
PYTHONPATH=$site "$venv/bin/python" tests/check_cuda_build.py --archs $(sed 's/\([0-9]\)\.\([0-9]a\?\)/sm_\1\2/g; s/+PTX//g' <<<"$archs")
binary=$(echo "$site"/randlora/_C*.so)
for library in GLIBC GLIBCXX; do
  echo "asks for $(objdump -T "$binary" | grep -o "${library}_[0-9.]*" | sort -Vu | tail -n 1)"
done
du -sh .gpu
