#!/usr/bin/env bash
# From a fresh clone to a trained model and a submission: installs, then runs recipes/quickstart.yaml.
# Further arguments go to `rewardmodel run`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh
.venv/bin/rewardmodel run recipes/quickstart.yaml --overwrite "$@"
