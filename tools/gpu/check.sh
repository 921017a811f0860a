#!/usr/bin/env bash
# On a machine with a CUDA card: the gpu tests, the measured runs, TRL's script beside ours. About ten minutes.
#
#   bash check.sh [PART…]       memory, trl, tests; all of them if none is named
#
# Runs where bundle.sh has put it (no network, nothing installed: torch and the usual scientific packages are enough),
# or in a checkout whose environment is active. Results go to $OUT (./gpu-results): measurements.json, tests.txt, logs;
# failed.txt names what failed, and then the exit status is 1.
# Checkpoints of random weights are made in $WORK (a folder in memory; 25 GiB).
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=$(realpath -m "${OUT:-gpu-results}"); work=${WORK:-/dev/shm/qtune-gpu}; logs=$out/logs; began=$SECONDS
parts=("$@"); [ $# -gt 0 ] || parts=(memory trl tests)
for part in "${parts[@]}"; do case $part in memory | trl | tests) ;;
    *) echo "no part is called $part; there are memory, trl and tests" >&2; exit 2 ;; esac; done
mkdir -p "$logs" "$work/models" "$work/runs"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TRANSFORMERS_VERBOSITY=error
python=${PYTHON:-python3}
if [ -f "$here/../bundle.txt" ]; then # unpacked nothing yet: this is a bundle
    bundle=$(cd "$here/.." && pwd); project=$work/project
    mkdir -p "$project" "$work/site"
    { cat "$bundle"/project.tar.xz | tar -xJ -C "$project"; } &&
        { [ -d "$work/site/transformers" ] || cat "$bundle"/site.tar.xz.* | tar -xJ -C "$work/site"; } ||
        { echo "the bundle could not be unpacked to $work" >&2; exit 1; }
    if compgen -G "$bundle/wheels/*.part-*" >/dev/null; then # the built-in model, as pip would fetch it
        mkdir -p "$work/wheels"; for first in "$bundle"/wheels/*.part-aa; do
            cat "${first%aa}"* >"$work/wheels/$(basename "${first%.part-aa}")"; done
        export PIP_NO_INDEX=1 PIP_FIND_LINKS=$work/wheels
    fi
    export PYTHONPATH=$project:$work/site QTUNE_CACHE=$work/cache
    tokenizer=$bundle/tokenizer
else
    project=$(cd "$here/../.." && pwd); export PYTHONPATH=$project
    tokenizer=$("$python" -c "from qtune.model.builtin import builtin_folder; print(builtin_folder('smollm2-135m-instruct'))")
fi
tools=$project/tools/gpu
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "torch sees no CUDA device here: qtune doctor says more" >&2; exit 1; }
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
says() { echo "$1, $((SECONDS - began)) s"; }
failed=$out/failed.txt; rm -f "$failed"
fails() { echo "failed: $1" | tee -a "$failed" >&2; }

checkpoints() {
    [ -f "$work/text.jsonl" ] || "$python" "$tools/make_rows.py" "$work" || fails "make_rows.py"
    for name in "$@"; do
        ("$python" "$tools/make_checkpoint.py" "$name" "$work/models/$name" "$tokenizer" >"$logs/make-$name.log" 2>&1 ||
            fails "checkpoint $name, logs/make-$name.log") &
    done; wait; says "checkpoints $*"
}

memory() { # they share the card: memory does not depend on who else works there, time does
    checkpoints 1b 3b 8b
    names=$("$python" "$tools/runs.py" "$work") || fails "runs.py"
    for name in $names; do
        (timeout 240 "$python" -m qtune run "$work/$name.toml" >"$logs/$name.log" 2>&1 ||
            fails "$name, logs/$name.log") &
    done; wait; says "runs"
}

trl() { # alone on the card, one after the other, so that their times count
    checkpoints 8b
    for batch in 4 1; do
        (cd "$work" && timeout 120 "$python" "$tools/trl_script.py" models/8b text.jsonl 2048 $batch 10) \
            2>"$logs/trl-$batch.log" | tail -1 >"$logs/8b-${batch}x2048.trl" || fails "TRL, logs/trl-$batch.log"
        "$python" "$tools/runs.py" "$work" >/dev/null || fails "runs.py"
        timeout 150 "$python" -m qtune run "$work/8b-${batch}x2048.toml" --set output.name="alone-8b-${batch}x2048" \
            --set training.steps=10 >"$logs/alone-8b-${batch}x2048.log" 2>&1 || fails "logs/alone-8b-${batch}x2048.log"
        says "TRL and qtune, 8b $batch x 2048"
    done
    timeout 150 "$python" -m qtune run "$work/8b-4x2048-auto.toml" --set training.steps=10 \
        >"$logs/8b-4x2048-auto.log" 2>&1 || fails "logs/8b-4x2048-auto.log"
    says "the fastest step that fits"
    find "$logs" -name '*.trl' -empty -delete
}

tests() {
    (cd "$project" && timeout 400 "$python" -m pytest -m gpu tests/test_gpu.py -q -p no:cacheprovider \
        -o addopts="") >"$out/tests.txt" 2>&1 || fails "tests, tests.txt"
    tail -15 "$out/tests.txt"; says "tests"
}

for part in "${parts[@]}"; do "$part"; done
"$python" "$tools/collect.py" "$work/runs" "$logs" >"$out/measurements.json" || fails "no measurements.json"
for run in "$work"/runs/*/; do
    name=$(basename "$run"); for file in memory.json metrics.jsonl; do
        [ -f "$run/$file" ] && cp "$run/$file" "$logs/$name.$file"; done
done
tar -C "$out" -czf "$out/logs.tar.gz" logs && rm -r "$logs" || fails "no logs.tar.gz, see $logs"
says "done: $out/measurements.json"
[ ! -s "$failed" ] || { echo "failed, of the logs in $out/logs.tar.gz:" >&2; cat "$failed" >&2; exit 1; }
