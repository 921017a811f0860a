#!/usr/bin/env bash
# From nothing to a tuned, tried and exported model. Run again, it shows what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1

# What is kept beside the run goes through a pipe, which has no width of its own.
[ ! -t 1 ] || export QTUNE_WIDTH="${COLUMNS:-$(tput cols 2>/dev/null || echo 80)}"

say() {
    if [ -t 1 ]; then printf '\n\033[1m$ %s\033[0m\n' "$*"; else printf '\n$ %s\n' "$*"; fi
}

run=runs/quickstart
shown=$run/demo
# Results of a finished run cost minutes to compute and seconds to read, so each is kept beside the run.
step() {
    local name=$1
    shift
    say "$*"
    if [ -f "$shown/$name" ]; then
        cat "$shown/$name"
        return
    fi
    mkdir -p "$shown"
    "$@" | tee "$shown/.$name"
    mv "$shown/.$name" "$shown/$name"
}

if [ -f "$run/adapter/adapter_config.json" ]; then
    echo "$run is trained already; remove the folder to train it again"
elif [ -f "$run/resolved.toml" ]; then
    say "qtune run --resume $run"
    qtune run --resume "$run"
else
    say "qtune run recipes/quickstart.toml"
    qtune run recipes/quickstart.toml
fi
step eval qtune eval "$run" --rows 120
step profile qtune profile "$run" --no-savings
step export qtune export "$run"
step ask python tools/ask_exported.py "$run/model" recipes/data/quickstart_test.jsonl

printf '\n%s holds the adapter, the whole model in model/, and report.html: what came of it, for a browser. Next:\n' "$run"
cat <<EOF
  .venv/bin/qtune chat $run  # talk to it
  .venv/bin/qtune init --base builtin:smollm2-135m-instruct --data ROWS.jsonl  # a recipe for rows of your own
EOF
