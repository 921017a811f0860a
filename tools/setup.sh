#!/usr/bin/env bash
# Makes .venv with qtune and the versions it is tested with. Does nothing when that is already done.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    echo "qtune needs Python 3.11 or newer; $python is $("$python" --version 2>&1 || echo missing). Set PYTHON=/path/to/python3." >&2
    exit 1
fi

wanted=$(cat pyproject.toml tools/constraints.txt | sha256sum)
if [ -x .venv/bin/qtune ] && [ "$(cat .venv/installed 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
echo "+ $python -m venv .venv" >&2
"$python" -m venv .venv
echo "+ .venv/bin/pip install --editable '.[dev]' --constraint tools/constraints.txt" >&2
echo "$(grep -c == tools/constraints.txt) packages, PyTorch the largest; all that pip says is in .venv/pip.log" >&2
if ! PYTHONUNBUFFERED=1 .venv/bin/python -m pip install --progress-bar off --disable-pip-version-check --editable '.[dev]' \
    --constraint tools/constraints.txt 2>&1 | "$python" tools/fetching.py .venv/pip.log; then
    echo "pip could not install them; what it said is in .venv/pip.log, and ends with:" >&2
    tail -n 5 .venv/pip.log >&2
    exit 1
fi
printf '%s\n' "$wanted" >.venv/installed
echo "installed; source .venv/bin/activate makes it: qtune" >&2
