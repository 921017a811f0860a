"""Beside the weights lies what a loader needs: the base's files, the tokenizer as trained, an honest config."""

import json
from pathlib import Path

import pytest
import torch
from export_models import tiny_base, tiny_tokenizer
from transformers import AutoModelForCausalLM

from qtune.data.template import CHATML
from qtune.export.merged_folder import generation_config
from qtune.export.model_files import copy_side_files, merged_config
from qtune.tuned.generate import find_ends


def folder(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name.replace("__", ".")).write_text(text)
    return path


def test_the_base_s_files_come_along_and_its_weights_do_not(tmp_path: Path) -> None:
    base = folder(
        tmp_path / "base",
        config__json="{}",
        generation_config__json="g",
        tokenizer__json="t",
        tokenizer__model="s",
        chat_template__jinja="c",
        LICENSE="l",
        modeling_own__py="m",
        model__safetensors="w",
        model__safetensors__index__json="i",
        pytorch_model__bin="p",
        README__md="r",
    )
    output = folder(tmp_path / "out")
    copy_side_files(base, base, output)
    assert sorted(file.name for file in output.iterdir()) == [
        "LICENSE",
        "chat_template.jinja",
        "generation_config.json",
        "modeling_own.py",
        "tokenizer.json",
        "tokenizer.model",
    ]


def test_the_tokenizer_as_trained_replaces_the_base_s(tmp_path: Path) -> None:
    base = folder(tmp_path / "base", tokenizer__json="old", tokenizer_config__json="old", chat_template__jinja="old")
    trained = folder(
        tmp_path / "run",
        tokenizer__json="new",
        tokenizer_config__json="new",
        adapter_config__json="{}",
        lock__json="{}",
    )
    output = folder(tmp_path / "out")
    copy_side_files(base, trained, output)
    assert {file.name: file.read_text() for file in output.iterdir()} == {
        "tokenizer.json": "new",
        "tokenizer_config.json": "new",
    }


def test_the_config_loses_its_quantization_and_says_the_output_dtype_everywhere(tmp_path: Path) -> None:
    config = {
        "model_type": "x",
        "torch_dtype": "float32",
        "quantization_config": {"load_in_4bit": True},
        "text_config": {"dtype": "bfloat16", "vocab_size": 5},
        "vocab_size": 5,
        "someone_else_s_key": [1],
    }
    base = folder(tmp_path / "base", config__json=json.dumps(config))
    assert merged_config(base, torch.float16, {"vocab_size": 7}) == {
        "model_type": "x",
        "dtype": "float16",
        "torch_dtype": "float16",
        "text_config": {"dtype": "float16", "vocab_size": 7},
        "vocab_size": 7,
        "someone_else_s_key": [1],
    }


@pytest.mark.parametrize("own", [None, {"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token_id": [5, 6]}, {}])
@pytest.mark.parametrize("of_model", [2, [2, 7, 9], None])
@pytest.mark.parametrize("template", [CHATML, "{% for m in messages %}{{ m.content }}{% endfor %}"])
def test_an_export_ends_its_answers_where_the_run_did(
    tmp_path: Path, template: str, of_model: int | list[int] | None, own: dict[str, object] | None
) -> None:
    """Whatever says it: a generation config, the model's own where there is none, the tokenizer, the template."""
    base = tiny_base(tmp_path / "base", eos_token_id=of_model)
    tokenizer = tiny_tokenizer(base)
    tokenizer.chat_template = template
    file = base / "generation_config.json"
    file.unlink(missing_ok=True)
    if own is not None:
        file.write_text(json.dumps(own))
    run = find_ends(AutoModelForCausalLM.from_pretrained(base), tokenizer).stop
    file.write_text(json.dumps(generation_config(base, tokenizer, template)))
    exported = AutoModelForCausalLM.from_pretrained(base).generation_config.eos_token_id
    assert tuple(sorted(exported if isinstance(exported, list) else [exported])) == run
