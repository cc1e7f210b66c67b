#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, the tests marked cuda, compute-sanitizer, the benchmarks; then a table.
#
#   bench/gpu.sh [RESULTS]      RESULTS: where CSV, plots and logs go (default: bench/results)
#
# Needs a CUDA torch, nvcc, pytest, and for the benchmarks tqdm, matplotlib and peft; installs nothing but randlora.
# PYTHON, TORCH_CUDA_ARCH_LIST (default: the GPUs at hand) and STEPS (default: all; a list such as "build tests") choose.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=${1:-bench/results}
steps=${STEPS:-build tests sanitizer bench}
logs=$results/gpu-logs
mkdir -p "$logs"
table=()

# run NAME COMMAND...: the log goes to a file, the outcome into the table.
run() {
  local name=$1 start=$SECONDS outcome=ok
  shift
  printf '== %s\n' "$name"
  "$@" >"$logs/$name.log" 2>&1 || outcome="FAILED ($?)"
  local last
  last=$(grep -E '(passed|failed|error|ERROR SUMMARY)' "$logs/$name.log" | tail -n 1 | cut -c 1-70)
  table+=("$(printf '%-22s %-12s %5d s  %s' "$name" "$outcome" $((SECONDS - start)) "$last")")
  [[ $outcome == ok ]]
}

wants() { [[ " $steps " == *" $1 "* ]]; }

if wants build; then
  RANDLORA_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-native} \
    run build "$python" -m pip install --no-build-isolation --no-deps --force-reinstall . ||
    { tail -n 30 "$logs/build.log"; exit 1; }
fi
if wants tests; then
  run pytest "$python" -m pytest -m cuda -q || tail -n 40 "$logs/pytest.log"
fi
if wants sanitizer; then
  # The kernels alone: under the sanitizer everything takes some hundred times as long.
  kernels=(tests/test_unique_base.py tests/test_dropout.py tests/test_layer_op.py)
  for tool in memcheck racecheck synccheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      --target-processes all "$python" -m pytest -m cuda -q -x "${kernels[@]}" \
      -k "not compile and not opcheck and not gradcheck and not graph"
  done
fi
if wants bench; then
  for question in bases unique_base linear; do
    run "bench-$question" "$python" -m bench "$question" --device cuda --quick --results "$results"
  done
fi

"$python" -c 'import torch, randlora; print(torch.cuda.get_device_name(), randlora.build_info())' 2>/dev/null
printf '%s\n' "${table[@]}"
for csv in "$results"/*/*.csv; do
  [[ -e $csv ]] || continue
  "$python" - "$csv" <<'PY'
import csv, sys

rows = [row for row in csv.DictReader(open(sys.argv[1])) if row["device"] == "cuda" and row["median_ms"]]
for row in rows:
    case = " ".join(list(row.values())[: list(row).index("provider")])
    print(f"{case:32} {row['provider']:28} {float(row['median_ms']):9.3f} ms {row['times_faster']:>7}x {row['baseline']}")
PY
done
