#!/usr/bin/env bash
# Runs `rewardmodel run` on one GPU or several:
#
#     scripts/launch.sh RECIPE [GPUS] [further arguments of `rewardmodel run`]
#     VERB=train scripts/launch.sh RECIPE [GPUS] --fold all
#
# GPUS is the number of GPUs of this machine (default: all that torch sees).
# ACCELERATE_CONFIG is a configuration of accelerate, a file or a name from recipes/accelerate (default: one_gpu for one
# GPU, ddp for several).
# On several machines MACHINE_RANK, MAIN_PROCESS_IP and MAIN_PROCESS_PORT override the configuration.
# PYTHON is the interpreter (default: that of .venv).
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

fail() {
    echo "error: $1" >&2
    exit 2
}

python=${PYTHON:-$root/.venv/bin/python}
command -v "$python" >/dev/null || fail "no $python; run scripts/setup.sh, or set PYTHON"
[ $# -ge 1 ] || fail "no recipe; scripts/launch.sh RECIPE [GPUS] [further arguments]"
recipe=$1
shift
[ -f "$recipe" ] || fail "$recipe: no such file; give the path of a recipe"

seen=$("$python" -c 'import torch; print(torch.cuda.device_count())') || fail "$python: no torch; run scripts/setup.sh"
gpus=$((seen > 0 ? seen : 1))
if [[ ${1:-} =~ ^[0-9]+$ ]]; then
    gpus=$1
    shift
fi
[ "$gpus" -ge 1 ] || fail "$gpus GPUS: at least one process is needed"

config=${ACCELERATE_CONFIG:-$([ "$gpus" -eq 1 ] && echo one_gpu || echo ddp)}
[ -f "$config" ] || config=$root/recipes/accelerate/${config%.yaml}.yaml
[ -f "$config" ] || fail "ACCELERATE_CONFIG: $ACCELERATE_CONFIG is neither a file nor a name in recipes/accelerate; give one of them"
setting() { sed -n "s/^$1: *\([^ #]*\).*/\1/p" "$config"; }

[ "$(setting use_cpu)" = true ] || [ "$gpus" -le "$((seen > 0 ? seen : 1))" ] || fail "$gpus GPUS, but torch sees $seen"
machines=$(setting num_machines)
rank=${MACHINE_RANK:-$(setting machine_rank)}
address=${MAIN_PROCESS_IP:-$(setting main_process_ip)}
port=${MAIN_PROCESS_PORT:-$(setting main_process_port)}
[ "${machines:-1}" -eq 1 ] || [ -n "$address" ] || fail "$config: ${machines} machines; set MAIN_PROCESS_IP and MACHINE_RANK"

if [ "$gpus" -eq 1 ] && [ "$seen" -gt 1 ]; then
    CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
    export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES%%,*} # else transformers would use every GPU that the process sees
fi
verb=${VERB:-run}
[ "$verb" != run ] || "$python" -m rewardmodel.cli run "$recipe" "$@" --print-config >/dev/null # reports errors once, not per process
threads=${OMP_NUM_THREADS:-$(("$(nproc)" / gpus))}
"$python" -m accelerate.commands.launch --quiet --config_file "$config" \
    --num_processes "$((gpus * ${machines:-1}))" --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" \
    ${rank:+--machine_rank "$rank"} ${address:+--main_process_ip "$address"} ${port:+--main_process_port "$port"} \
    -m rewardmodel.cli "$verb" "$recipe" "$@" || {
    echo "error: a process failed, see above; continue the run with --resume" >&2
    exit 1
}
