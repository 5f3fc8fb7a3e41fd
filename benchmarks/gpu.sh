#!/usr/bin/env bash
# Everything that needs one CUDA card, in under 8 minutes:
#   benchmarks/gpu.sh [FOLDER]
# Tests marked `gpu`, whole steps at two published shapes, and the overhead of small problems.
# JSON, pictures and a log go to FOLDER (default: gpu-results); the exit code is that of the
# first part that failed, after all of them ran.
set -uo pipefail

out=$(mkdir -p "${1:-gpu-results}" && cd "${1:-gpu-results}" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
log="$out/log.txt"
: >"$log"
failed=0

part() {
  local limit=$1 title=$2
  shift 2
  printf '\n==> %s (%d s)\n' "$title" "$SECONDS" | tee -a "$log"
  timeout "$limit" "$@" >>"$log" 2>&1
  local code=$?
  if ((code)); then
    printf 'failed with exit code %d\n' "$code" | tee -a "$log"
    ((failed)) || failed=$code
  fi
}

python - <<'PYTHON' | tee -a "$log"
import torch

if not torch.cuda.is_available():
    raise SystemExit("torch finds no CUDA device: nothing here can run.")
print(torch.__version__, torch.cuda.get_device_name(0))
PYTHON
((PIPESTATUS[0])) && exit 1

part 150 "Tests on the card" python -m pytest -m gpu tests/hypergrad tests/bidora -q \
  -p no:cacheprovider --junitxml "$out/tests.xml"
part 100 "Steps of RoBERTa-large" python -m benchmarks.step_cost \
  --shape roberta-large --device cuda --rounds 2
part 120 "Steps of Llama-3.2-1B" python -m benchmarks.step_cost \
  --shape llama-3.2-1b --device cuda --rounds 2
part 90 "Overhead of small problems" python -m benchmarks.overhead --device cuda --rounds 3

for name in step_cost_roberta-large step_cost_llama-3.2-1b overhead_cuda; do
  for file in "benchmarks/results/$name.json" "docs/images/benchmarks/$name.png"; do
    [[ -f $file ]] && cp "$file" "$out"
  done
done
printf '\n==> Done in %d s: %s\n' "$SECONDS" "$out" | tee -a "$log"
exit "$failed"
