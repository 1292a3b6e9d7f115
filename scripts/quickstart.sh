#!/usr/bin/env bash
# Installs into .venv, then runs recipes/quickstart.yaml: from a fresh clone to a trained model and a submission.
# Further arguments are passed to `rewardmodel run`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/rewardmodel run recipes/quickstart.yaml --overwrite "$@"
