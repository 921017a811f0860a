#!/usr/bin/env bash
# The Triton kernels without a card: compiled for every generation of cards, and interpreted beside PyTorch's operations.
# Fetches Triton (190 MB) into a folder of its own; needs the environment of tools/setup.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
.venv/bin/python -m pip install -q --no-deps --target "$work/triton" triton==3.6.0
export PYTHONPATH=$PWD:$work/triton TRITON_CACHE_DIR=$work/cache
.venv/bin/python tools/compile_kernels.py
.venv/bin/python -m pytest -q -p no:cacheprovider tests/test_kernels.py -k interprets
