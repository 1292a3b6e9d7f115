#!/usr/bin/env bash
# Runs lint, format, types and tests, with one test process a core and at most eight.
# Further arguments are passed to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy & # one core for a minute, which the tests can share
types=$!
# Neighbouring tests share fixtures: worksteal keeps them together and evens out the ends.
# OpenMP threads that spin while idle would take the cores from the other test processes.
OMP_NUM_THREADS=1 GOMP_SPINCOUNT=0 .venv/bin/python -m pytest --numprocesses logical --maxprocesses 8 --dist worksteal "$@"
wait "$types"
