#!/usr/bin/env bash
# What Cresset makes of a GPU, beside libtorch in process on the same one. Builds nothing; without a GPU it says so and ends well.
#
#   tests/gpu.sh [--dry-run] [FLAGS OF cresset-bench]
#
# 1. the bench's throughput part on the first GPU: each model at several concurrencies, as a ratio to libtorch at its best batch
#    (goal: 0.9);
# 2. whether copies overlap with the batch before: the time that inputs, model and outputs of all batches took together, over
#    the time that passed; above 1 they overlap;
# 3. with several GPUs: what all of them give over what one gives.
#
# It needs target/release (make build), .cresset/models (make models) and libtorch's CUDA half of the very release that the
# binaries are linked with. That half is looked for beside libtorch_cpu.so; LIBTORCH_LIB names another folder that has both, such
# as the `torch/lib` of an installed torch 2.11.0. --dry-run does it all on the processor, to see that the script works.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

device=cuda
if [[ ${1:-} == --dry-run ]]; then
  device=cpu
  shift
fi

skip() {
  printf 'gpu.sh: skipped: %s\n' "$1"
  exit 0
}

gpus() {
  nvidia-smi --query-gpu=uuid --format=csv,noheader 2>/dev/null || true
}

bin=target/release
for program in cresset cresset-worker cresset-coordinator cresset-bench; do
  [[ -x $bin/$program ]] || skip "there is no $bin/$program: run make build"
done
[[ -e .cresset/models/minilm/1/model.pt ]] || skip "there are no models in .cresset/models: run make models"
[[ -x .cresset/venv/bin/python ]] || skip "there is no .cresset/venv: run python3 deploy/bootstrap/fetch.py venv"
if [[ -n ${LIBTORCH_LIB:-} ]]; then
  [[ -e $LIBTORCH_LIB/libtorch_cpu.so ]] || skip "LIBTORCH_LIB is $LIBTORCH_LIB, which has no libtorch_cpu.so"
  # What torch's wheels bring beside it: the CUDA libraries that its own run path names.
  export LD_LIBRARY_PATH=$LIBTORCH_LIB${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi
if [[ $device == cuda ]]; then
  [[ -n $(gpus) ]] || skip "nvidia-smi shows no GPU"
  libraries=$(ldd $bin/cresset-worker | awk '$1 == "libtorch_cpu.so" { print $3 }')
  [[ -e ${libraries%/*}/libtorch_cuda.so ]] || skip "there is no libtorch_cuda.so beside $libraries: name the lib folder of torch 2.11.0 in LIBTORCH_LIB"
  mapfile -t all < <(gpus)
  printf 'gpu.sh: %d GPUs: %s\n' "${#all[@]}" "$(nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c | tr -s ' ' | paste -sd, -)"
else
  all=(none)
fi

in_flight=256
[[ $device == cuda ]] || in_flight=8
out=target/bench/$device
mkdir -p "$out"
# One GPU for both sides, so that the ratio is of the same one.
printf 'gpu.sh: throughput beside libtorch in process\n'
CUDA_VISIBLE_DEVICES=${all[0]} $bin/cresset-bench --device $device --only throughput --out "$out" "$@"

scratch=$(mktemp -d)
up=
finish() {
  if [[ -n $up ]]; then
    kill "$up" 2>/dev/null || true
    wait "$up" 2>/dev/null || true
    up=
  fi
}
trap 'finish; rm -rf "$scratch"' EXIT

# start GPUS: a coordinator and a worker with minilm on these GPUs.
start() {
  rm -rf "$scratch/cluster"
  CUDA_VISIBLE_DEVICES=$1 $bin/cresset up --coordinators 1 --workers 1 --base-port 0 --device $device \
    --data-dir "$scratch/cluster" --model-repository .cresset/models --deploy minilm > "$scratch/up.log" 2>&1 &
  up=$!
  for ((tenth = 0; tenth < 1200; tenth++)); do
    if grep -q 'ready after' "$scratch/up.log"; then
      return
    fi
    kill -0 "$up" 2>/dev/null || break
    sleep 0.1
  done
  cat "$scratch/up.log" >&2
  exit 1
}

member() {
  python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["workers"][0][sys.argv[2]])' "$scratch/cluster/cluster.json" "$1"
}

# What the worker has counted of minilm: nanoseconds of inputs, model and outputs of all batches; requests; batches.
counted() {
  .cresset/venv/bin/python -c '
import sys
import tritonclient.grpc as triton
(told,) = triton.InferenceServerClient(sys.argv[1]).get_inference_statistics("minilm").model_stats
spent = sum(part.ns for batch in told.batch_stats for part in (batch.compute_input, batch.compute_infer, batch.compute_output))
print(spent, told.inference_count, told.execution_count)' "$(member grpc)"
}

# load SECONDS: requests a second of minilm, 128 tokens each, straight at the worker.
load() {
  $bin/cresset --endpoints "$(member grpc)" -o json bench minilm --concurrency $in_flight --duration "$1s" --warmup 0s \
    --input "input_ids=101$(printf ',7592%.0s' {1..127})" --input "attention_mask=1$(printf ',1%.0s' {1..127})" \
    | python3 -c 'import json, sys; print(json.load(sys.stdin)["levels"][0]["throughput"])'
}

printf 'gpu.sh: copies beside computing\n'
start "${all[0]}"
load 3 > /dev/null
before=$(counted)
one=$(load 10)
after=$(counted)
finish
# shellcheck disable=SC2086
python3 - $before $after "$one" <<'PYTHON'
import sys

before, after, rate = [float(word) for word in sys.argv[1:4]], [float(word) for word in sys.argv[4:7]], float(sys.argv[7])
spent_ns, requests, batches = (end - begin for begin, end in zip(before, after))
overlap = spent_ns / 1e9 / (requests / rate)
print(f"gpu.sh: minilm, 128 tokens: {rate:.0f} requests/s in batches of {requests / batches:.1f}; inputs, model and outputs took "
      f"{overlap:.2f} times the time that passed: {'they overlap' if overlap > 1 else 'nothing shows that they overlap'}")
PYTHON
if ((${#all[@]} > 1)); then
  start "$(IFS=,; echo "${all[*]}")"
  load 3 > /dev/null
  many=$(load 10)
  finish
  python3 -c 'import sys; one, many, count = map(float, sys.argv[1:]); print(f"gpu.sh: {count:.0f} GPUs give {many / one:.2f} times what one gives")' "$one" "$many" "${#all[@]}"
else
  printf 'gpu.sh: one GPU: nothing to spread instance groups over\n'
fi
printf 'gpu.sh: figures in %s\n' "$out/results.json"
