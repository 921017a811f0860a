#!/usr/bin/env bash
# The whole test suite, on any computer, one process a core. Arguments go to pytest: bash tools/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
export HF_HUB_OFFLINE=1

# A process has one thread (tests/conftest.py) and takes up to 1.5 GiB. Files that are named run in this one: quicker, and
# --pdb works.
workers=$(nproc)
fitting=$(($(getconf _PHYS_PAGES) * $(getconf PAGE_SIZE) / 2147483648))
[ "$workers" -le "$fitting" ] || workers=$fitting
[[ $workers -gt 1 && "$*" != *.py* ]] || workers=0
exec .venv/bin/python -m pytest --numprocesses "$workers" --dist worksteal "$@"
