#!/usr/bin/env bash
# What only a CUDA card can show: training in 16 bits, the allocator's figures against the prediction, 8-bit optimizers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
export HF_HUB_OFFLINE=1
.venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "torch sees no CUDA device here: qtune doctor says more" >&2; exit 1; }
exec .venv/bin/python -m pytest -m gpu "$@"
