#!/usr/bin/env bash
# Lint, format, types, tests: a process a core, eight at most. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Idle threads that spin take the cores from the other processes.
OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 .venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 "$@"
