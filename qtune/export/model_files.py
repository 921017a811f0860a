"""What lies beside the weights: config, generation config, tokenizer, chat template, licence."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

# Everything that a loader reads beside the weights; no weights of any format, no folders.
SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".py"}
NAMES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")

# Written by us, or about files that are not copied.
OWN = {"config.json", "builtin.json", "verify.json", "manifest.json"}


def copy_side_files(base: Path, tokenizer: Path, output: Path) -> None:
    """Copies what a loader needs from the base folder, then the tokenizer as trained over it.

    `tokenizer` is a folder with tokenizer files; where it holds a tokenizer, the base's own chat templates are not
    copied, for a template that training removed must not come back.
    """
    trained = tokenizer.resolve() != base.resolve() and (tokenizer / "tokenizer_config.json").exists()
    for file in sorted(base.iterdir()):
        if _is_side_file(file) and not (trained and file.name.startswith("chat_template")):
            shutil.copyfile(file, output / file.name)
    if trained:
        for file in sorted(tokenizer.iterdir()):
            if _is_tokenizer_file(file):
                shutil.copyfile(file, output / file.name)


def merged_config(base: Path, dtype: torch.dtype, changes: dict[str, Any]) -> dict[str, Any]:
    """The base's config.json without its quantization, in the output dtype, with `changes` made.

    The text is edited rather than read by transformers and written back, so that keys of other tools stay.
    """
    config: dict[str, Any] = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for table in (config, config.get("text_config")):
        if isinstance(table, dict):
            table.pop("quantization_config", None)
            # transformers writes "dtype" since version 5; older ones, vLLM among them, read "torch_dtype".
            table.pop("torch_dtype", None)
            table["dtype"] = str(dtype).removeprefix("torch.")
            table.update({key: value for key, value in changes.items() if table is config or key in table})
    config["torch_dtype"] = config["dtype"]
    return config


def write_json(file: Path, value: Any) -> None:
    """JSON as transformers writes it: two spaces, a line end."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _is_side_file(file: Path) -> bool:
    if not file.is_file() or file.name in OWN or file.name.endswith(".index.json"):
        return False
    return file.suffix in SUFFIXES or file.stem.upper() in NAMES


def _is_tokenizer_file(file: Path) -> bool:
    """Tokenizer files as `save_pretrained` names them; an adapter folder holds other JSON files, too."""
    stems = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "spiece")
    return file.is_file() and file.name.startswith(stems) and file.suffix in SUFFIXES
