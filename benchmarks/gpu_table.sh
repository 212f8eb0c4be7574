#!/usr/bin/env bash
# Every figure that has a target on a GPU, in three parts of 7 minutes at most, for a card that is lent for minutes:
#
#     bash benchmarks/gpu_table.sh 1 gpu        # Qwen3-0.6B's shape beside TRL: tokens/s, memory, waiting, long rows
#     bash benchmarks/gpu_table.sh 2 gpu        # the 4 B shape, kernels one by one, then tests/gpu
#     bash benchmarks/gpu_table.sh 3 gpu        # long rows (tiles, layers' inputs on the host), a 4 B shape in bfloat16
#
# What was measured lies in the folder gpu: tables (*.txt) and figures (*.json). What follows is for gpu.py:
# `bash benchmarks/gpu_table.sh 1 gpu --shape tiny --steps 3` tries a part on a CPU. PYTHON names another python3.
set -uo pipefail
part=${1:?1, 2 or 3} out=$(mkdir -p "${2:?a folder for the results}" && cd "$2" && pwd); shift 2
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}

measure() { # measure NAME BUDGET FLAGS...
  local name=$1 budget=$2; shift 2
  "$python" benchmarks/gpu.py --budget "$budget" --timeout 120 --json "$out/$name.json" "$@" 2>&1 | tee "$out/$name.txt"
}

case $part in
1) measure table 390 --only 16k trl 16-rows 16k-zero2 8k-rows 16k-rows 64k-row trl-liger "$@" ;;
2) measure 4b 100 --shape 4b --steps 15 --only 16k-recomputed "$@"
   measure kernels 130 --only 16k-compile 16k-none 16k-mixture "$@"
   timeout 190 "$python" -m pytest tests/gpu -rs 2>&1 | tee "$out/tests.txt" ;;
3) measure long 290 --only 64k-row 64k-whole 64k-offload 128k-offload "$@"
   measure narrow 100 --shape 4b --steps 15 --only 16k-narrow "$@" ;;
*) echo "gpu_table.sh: $part: there are parts 1, 2 and 3" >&2; exit 2 ;;
esac
