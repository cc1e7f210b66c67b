#!/usr/bin/env bash
# Everything that needs a GPU: build, the tests marked cuda, compute-sanitizer, our kernels by themselves, ncu's metrics
# of them, the benchmarks; then a table. No step takes more than LIMIT seconds; all take some 30 minutes on an H100.
#
#   bench/gpu.sh [RESULTS]      RESULTS: where CSV, plots and logs go (default: bench/results)
#
# Needs a CUDA torch, nvcc, pytest, and for the benchmarks tqdm, matplotlib and peft; installs nothing but randlora.
# PYTHON, TORCH_CUDA_ARCH_LIST (default: the GPUs at hand), QUESTIONS, LIMIT and STEPS (default: all; a list such as
# "build tests", or one tool of the sanitizer) choose. STEPS that were cut off can be run again by themselves.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=${1:-bench/results}
limit=${LIMIT:-570}
steps=${STEPS:-build tests kernels ncu memcheck racecheck synccheck initcheck bench}
questions=${QUESTIONS:-linear model kinds bases unique_base generate memory}
table=()

# As bench/records.py names the folder.
machine=$("$python" -c 'import re, torch
print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-"))') ||
  { echo "no CUDA device is visible to torch in $python" >&2; exit 1; }
logs=$results/$machine/logs
kernels=$results/$machine/kernels
mkdir -p "$logs" "$kernels"

# run NAME COMMAND...: the log goes to a file, the outcome into the table.
run() {
  local name=$1 start=$SECONDS outcome=ok
  shift
  printf '== %s\n' "$name"
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1 || outcome="FAILED ($?)"
  local last
  last=$(grep -E '(passed|failed|[Ee]rror|ERROR SUMMARY)' "$logs/$name.log" | tail -n 1 | cut -c 1-70)
  table+=("$(printf '%-22s %-12s %5d s  %s' "$name" "$outcome" $((SECONDS - start)) "$last")")
  [[ $outcome == ok ]]
}

wants() { [[ " $steps " == *" $1 "* ]]; }

if wants build; then
  RANDLORA_CUDA=1 TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-native} MAX_JOBS=${MAX_JOBS:-$(nproc)} \
    run build "$python" -m pip install --no-build-isolation --no-deps -e . ||
    { tail -n 30 "$logs/build.log"; exit 1; }
fi
if wants tests; then
  run pytest "$python" -m pytest -m cuda -q || tail -n 40 "$logs/pytest.log"
fi
if wants kernels; then
  run kernels "$python" -m bench.kernels && grep '^"' "$logs/kernels.log" >/dev/null &&
    cp "$logs/kernels.log" "$kernels/kernels.csv" && cat "$kernels/kernels.csv"
fi
if wants ncu; then
  if command -v ncu >/dev/null; then
    metrics=gpu__time_duration.sum,dram__bytes.sum,dram__throughput.avg.pct_of_peak_sustained_elapsed
    metrics+=,sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__warps_active.avg.pct_of_peak_sustained_active
    metrics+=,launch__registers_per_thread,l1tex__data_bank_conflicts_pipe_lsu.sum
    run ncu ncu --csv --page raw --profile-from-start off --kernel-name-base demangled -k regex:randlora \
      --metrics "$metrics" --log-file "$kernels/ncu.csv" "$python" -m bench.kernels --ncu
  else
    table+=("$(printf '%-22s %s' ncu "skipped: there is no ncu on PATH")")
  fi
fi
# The kernels alone: under the sanitizer everything takes some hundred times as long.
sanitized=(tests/test_unique_base.py tests/test_dropout.py tests/test_ternary.py tests/test_bases.py)
for tool in memcheck racecheck synccheck initcheck; do
  wants "$tool" || continue
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
    --target-processes application-only "$python" -m pytest -m cuda -q -x "${sanitized[@]}" \
    -k "not test_op and not compile and not gradcheck and not torch_func and not allocates"
done
# Sized for ten minutes each: the cases of the targets first, so that a run that is cut off has them.
benches=(
  "linear --d 4096 --tokens 8192 --dtype bfloat16 --seconds 10"
  "linear --d 3072 --tokens 840 --dtype bfloat16 --seconds 10"
  "linear --seconds 3"
  "model --model Llama-3.2-3B --seconds 10"
  "model --model Llama-3.2-3B --targets all-linear --batch 8 --tokens 1024 --seconds 10"
  "model --model ViT-B/32,CLIP_ViT-L/14 --batch 128 --seconds 5"
  "kinds --d 4096 --tokens 8192 --dtype bfloat16 --seconds 5"
  "bases --seconds 5"
  "unique_base --seconds 3"
  "generate --batch 1 --seconds 5"
  "generate --layers --seconds 5"
  "memory --model Llama-3.2-3B"
)
if wants bench; then
  for i in "${!benches[@]}"; do
    read -ra words <<<"${benches[i]}"
    [[ " $questions " == *" ${words[0]} "* ]] || continue
    # A name with a blank in it has "_" there above.
    run "bench-$i-${words[0]}" "$python" -m bench "${words[@]//_V/ V}" --device cuda --results "$results"
  done
  run report "$python" -m bench report --results "$results"
fi

"$python" -c 'import torch, randlora; print(torch.cuda.get_device_name(), randlora.build_info())' 2>/dev/null
printf '%s\n' "${table[@]}"
for csv in "$results/$machine"/*.csv; do
  [[ -e $csv ]] || continue
  "$python" - "$csv" <<'PY'
import csv, sys

rows = [row for row in csv.DictReader(open(sys.argv[1])) if row.get("device") == "cuda" and row["median_ms"]]
for row in rows:
    case = " ".join(list(row.values())[: list(row).index("provider")])
    print(f"{case:32} {row['provider']:28} {float(row['median_ms']):9.3f} ms {row['times_faster']:>7}x {row['baseline']}")
PY
done
[[ ${table[*]} != *FAILED* ]]
