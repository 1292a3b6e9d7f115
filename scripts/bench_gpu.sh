#!/usr/bin/env bash
# Compares training and inference of large shapes with stock code on one GPU, in less than nine minutes:
#
#     scripts/bench_gpu.sh [RESULTS] [SHAPE ...]
#
# First it runs four optimiser steps in which a synchronisation with the GPU is an error. Then it measures every shape
# once: 6 optimiser steps of 8 battles after 2 to warm up (ours, trainer, trl), and 64 battles in both orders after 16 to
# warm up (ours, stock, sorted).
#
# RESULTS (default: scripts/results) receives training.json and inference.json, written after every measurement. A part
# that exceeds its share of the remaining time is stopped and keeps what it has written.
# SHAPE defaults to qwen3-4b, llama-3-8b and gemma-2-9b.
# REPEATS (1) is the number of measurements, SECONDS_IN_ALL (530) limits the total time, BATTLES is a labelled file to
# use instead of random ids, PYTHON is the interpreter (default: that of .venv).
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

part() { # WEIGHT NAME COMMAND...: run a part for at most its share of the remaining time
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
