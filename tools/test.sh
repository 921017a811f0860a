#!/usr/bin/env bash
# The whole test suite, on any computer. Arguments go to pytest: bash tools/test.sh tests/test_model_loss.py -k tile
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
export HF_HUB_OFFLINE=1
exec .venv/bin/python -m pytest "$@"
