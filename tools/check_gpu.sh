#!/usr/bin/env bash
# What only a CUDA card can show: training in 16 bits, the allocator's figures against the prediction, 8-bit optimizers.
#
#   bash tools/check_gpu.sh                  the gpu tests, here
#   bash tools/check_gpu.sh --all            and the eleven measured recipes, TRL's script beside ours (about ten minutes)
#   bash tools/check_gpu.sh --bundle [DIR]   a folder that does all of it where nothing can be installed (tools/gpu/)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
export HF_HUB_OFFLINE=1 PYTHON=$PWD/.venv/bin/python
case ${1:-} in
--bundle) exec bash tools/gpu/bundle.sh "${2:-.gpu}" ;;
--all) exec bash tools/gpu/check.sh ;;
esac
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "torch sees no CUDA device here: qtune doctor says more" >&2; exit 1; }
exec "$PYTHON" -m pytest -m gpu "$@"
