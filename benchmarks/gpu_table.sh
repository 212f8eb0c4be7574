#!/usr/bin/env bash
# Every figure that has a target on a GPU, in three parts of 13 minutes in all, for a card that is lent for minutes. What
# matters most comes first, in the parts and in each of them; a part ends when its seconds are used up.
#
#     bash benchmarks/gpu_table.sh 1 gpu   # 330 s: Qwen3-0.6B's shape beside TRL: tokens/s, memory, waiting, long rows
#     bash benchmarks/gpu_table.sh 2 gpu   # 270 s: the 4 B shape, then tests/gpu
#     bash benchmarks/gpu_table.sh 3 gpu   # 180 s: kernels one by one, layers' inputs on the host, 16-bit states
#
# What was measured lies in the folder gpu: tables, and the last lines of what failed (*.txt), figures (*.json). What
# follows is for gpu.py: `bash benchmarks/gpu_table.sh 1 gpu --shape tiny --steps 3` tries a part on a CPU, where it is
# slower: `BUDGET=10` makes ten times as many seconds of it. PYTHON names another python3.
set -uo pipefail
part=${1:?1, 2 or 3} out=$(mkdir -p "${2:?a folder for the results}" && cd "$2" && pwd); shift 2
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3} times=${BUDGET:-1}

measure() { # measure NAME SECONDS FLAGS...
  local name=$1 seconds=$(($2 * times)); shift 2
  "$python" benchmarks/gpu.py --budget "$seconds" --timeout $((120 * times)) --json "$out/$name.json" "$@" 2>&1 |
    tee "$out/$name.txt"
}

check() { # check SECONDS: what takes longest comes last; at the end of the time pytest still says what it has found
  timeout -s INT -k 10 $(($1 * times)) "$python" -m pytest tests/gpu/test_parts.py tests/gpu/test_steps.py \
    tests/gpu/test_offload.py tests/gpu/test_losses.py -v -rfEs 2>&1 | tee "$out/tests.txt"
}

case $part in
1) measure table 330 --only 16k trl 16-rows 16k-zero2 8k-rows 16k-rows 64k-row trl-liger "$@" ;;
2) measure 4b 80 --shape 4b --steps 15 --only 16k-recomputed "$@"
   check 190 ;;
3) measure more 120 --only 16k-compile 64k-offload 64k-whole 16k-mixture 128k-offload 16k-none "$@"
   measure narrow 60 --shape 4b --steps 15 --only 16k-narrow "$@" ;;
*) echo "gpu_table.sh: $part: there are parts 1, 2 and 3" >&2; exit 2 ;;
esac
