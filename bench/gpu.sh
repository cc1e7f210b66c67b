#!/usr/bin/env bash
# What only a GPU can tell, in calls of at most six minutes each on an H100, "quality" of seven and a half:
#
#   bench/gpu.sh correct RESULTS     is it right, does the host ever wait; then one layer, Llama-3.2-3B and decoding
#   bench/gpu.sh deep RESULTS        sanitizer, all of the tests, ncu, the other models, bases, UniqueBaseGrad
#   bench/gpu.sh quality RESULTS     which learning rate is best over rank, width and kind; what each method is worth.
#                                    Before, without a GPU: python -m bench quality --prepare .gpu/quality. A second
#                                    call goes on from .gpu/before, the folder results/ of the first one's archive
#   bench/gpu.sh forms RESULTS       the forms that layers and files come in: bases that are not kept, experts, quantised
#                                    layers, adapters as LoRA and merged tensors; tests of what no GPU had run before
#   bench/gpu.sh CALL RESULTS --device cpu      every step at tiny sizes, to try the script (tests/bench/test_gpu_script.py)
#
# In the folder RESULTS: CALL.txt, a table of at most 60 lines that is printed as well, and CALL.tar.gz, everything else
# (logs, CSV files). Both are written anew after every step, and every step has a time limit, so that a call that is cut
# off has what it got so far. The steps, the most valuable first, with what each should take, are in bench/gpu_steps.py:
# whoever adds a kind of bases, a strategy or a kernel adds its cases to the first call in the same change.
#
# Needs a CUDA torch, transformers, peft, pytest, hypothesis, tqdm and matplotlib; compute-sanitizer and ncu where they
# are on PATH; bitsandbytes and torchao for quantised layers, from .gpu/packages where it is there. randlora comes from
# .gpu/ (bench/gpu_build.sh makes both beforehand, on a machine without a GPU), or is the installed one, or is built
# here, which takes minutes of the call. PYTHON (default python3) chooses the interpreter.
# Nothing is installed into it, and the GPU's settings are left alone. BENCH_COMMIT is the commit that results are said to
# be of (default: that of .gpu/).
set -uo pipefail
began=$(date +%s)
call=${1:?"usage: bench/gpu.sh correct|deep|quality|forms RESULTS [--device cpu]"}
results=${2:?"usage: bench/gpu.sh correct|deep|quality|forms RESULTS [--device cpu]"}
shift 2
[[ $call =~ ^(correct|deep|quality|forms)$ ]] || { echo "no call is named $call: correct, deep, quality or forms" >&2; exit 2; }
cd "$(dirname "$0")/.." || exit 1
mkdir -p "$results"
results=$(cd "$results" && pwd)
python=${PYTHON:-python3}
device=cuda
[[ " $* " == *" --device cpu "* ]] && device=cpu

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site
mkdir "$site"
log=$work/install.log

# Whether the randlora that Python finds computes on the device, in so many seconds. Not started in the checkout, whose folder of that name
# may have no binary.
computes() {
  (cd "$work" && timeout "${1:-120}" "$python" -c "import torch, randlora
out = torch.empty(4, 4, 4, device='$device')
torch.ops.randlora.fill_bases_(out, 1, 1, (0, 0, 0), None)
assert out.isfinite().all()
print(randlora.__file__, randlora.build_info())") >>"$log" 2>&1
}

from_wheel() {
  compgen -G '.gpu/*.whl' >/dev/null || return 1
  sha256sum --check --quiet .gpu/sources.sha256 >>"$log" 2>&1 ||
    { echo "csrc has changed since bench/gpu_build.sh: its wheel is not used" >>"$log"; return 1; }
  timeout 60 "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
    --target "$site" .gpu/*.whl >>"$log" 2>&1 || return 1
  # The wheel's binary, the checkout's Python.
  (cd randlora && find . -name '*.py' -exec cp --parents {} "$site/randlora/" \;)
  PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} computes
}

from_source() {
  [[ $device == cuda ]] || return 1
  echo "building, as there is no wheel in .gpu/ that fits" >>"$log"
  RANDLORA_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0a} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    timeout 240 "$python" -m pip install --quiet --no-index --no-build-isolation --no-deps --target "$site" --upgrade . \
    >>"$log" 2>&1 && PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} computes
}

if from_wheel; then
  how="the wheel in .gpu"
elif computes; then
  how="the installed one"
elif from_source; then
  how="built here"
else
  echo "randlora cannot be had for $device:" && tail -n 30 "$log"
  cp "$log" "$results/$call-install.log"
  exit 1
fi
[[ $how == "the installed one" ]] || export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}

# Behind everything else, and for this call alone: PEFT loads them where they are, and what the other calls measure
# shall not change with what lies here.
[[ $call == forms && $device == cuda && -d .gpu/packages ]] && export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD/.gpu/packages

[[ $call == quality && -d .gpu/before ]] && cp -r .gpu/before "$work/results"

# Many small processes share the GPU where NVIDIA's service for that can be started; where not, they take turns.
if [[ $call == quality && $device == cuda ]] && command -v nvidia-cuda-mps-control >/dev/null; then
  export CUDA_MPS_PIPE_DIRECTORY=$work/mps CUDA_MPS_LOG_DIRECTORY=$work/mps-log
  mkdir "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"
  stop_sharing() { echo quit | timeout 10 nvidia-cuda-mps-control >>"$log" 2>&1; }
  if timeout 20 nvidia-cuda-mps-control -d </dev/null >>"$log" 2>&1 &&
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True computes 40; then
    how+=", processes share the GPU through MPS"
    trap 'stop_sharing; rm -rf "$work"' EXIT
  else
    stop_sharing
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
    how+=", without MPS"
  fi
fi

export BENCH_COMMIT=${BENCH_COMMIT:-$(cat .gpu/commit 2>/dev/null || echo unknown)}
echo "randlora: $how, after $(($(date +%s) - began)) s"
"$python" -m bench gpu "$call" --results "$results" --began "$began" --work "$work" "$@"
