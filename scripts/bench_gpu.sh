#!/usr/bin/env bash
# Training and inference of the big shapes beside stock code on one GPU, in less than nine minutes:
#
#     scripts/bench_gpu.sh [RESULTS] [SHAPE ...]
#
# First four optimiser steps in which waiting for the GPU is an error. Then of every shape, once each: 6 optimiser steps
# of 8 battles after 2 to warm up, ours, trainer and trl; 64 battles in both orders after 16, ours, stock and sorted.
# RESULTS, scripts/results by default, gets training.json and inference.json, written after every measurement: a part
# that outlasts its share of the time left is stopped and leaves what it has. SHAPE: qwen3-4b, llama-3-8b and gemma-2-9b
# by default. REPEATS (1) measures more often, SECONDS_IN_ALL (530) bounds the whole, BATTLES names a labelled file in
# the place of drawn ids, PYTHON the interpreter, that of .venv by default.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

python=${PYTHON:-.venv/bin/python}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "error: $python sees no GPU; set PYTHON to one whose torch does" >&2
    exit 2
}
results=${1:-scripts/results}
[ $# -gt 0 ] && shift
shapes=("$@")
[ $# -gt 0 ] || shapes=(qwen3-4b llama-3-8b gemma-2-9b)
all=${SECONDS_IN_ALL:-530}
weights=$((10 + ${#shapes[@]} * (25 + 15)))
bad=0

part() { # WEIGHT NAME COMMAND...: run a part for at most its share of the time that is left
    local share=$(((all - SECONDS) * $1 / weights)) name=$2 begin=$SECONDS
    weights=$((weights - $1))
    shift 2
    echo "== $name, at most $share s"
    timeout "$((share > 0 ? share : 1))" "$@"
    local code=$?
    [ $code -eq 0 ] || bad=1
    echo "== $name: $([ $code -eq 124 ] && echo stopped || echo "exit code $code") after $((SECONDS - begin)) s"
}

bench() { # WEIGHT SCRIPT SHAPE
    part "$1" "$2 $3" "$python" "scripts/bench_$2.py" "${BATTLES:---synthetic}" --shape "$3" \
        --repeats "${REPEATS:-1}" --json "$results/$2.json"
}

part 10 "no waiting in a step of ${shapes[0]}" \
    "$python" scripts/bench_training.py --synthetic --shape "${shapes[0]}" --battles 32 --synchronisation
for shape in "${shapes[@]}"; do bench 25 training "$shape"; done
for shape in "${shapes[@]}"; do bench 15 inference "$shape"; done
exit $bad
