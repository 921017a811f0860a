"""A run -> a folder that plain transformers loads: LoRA and IA3 merged, a soft prompt baked into the vocabulary."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qtune import console
from qtune.data.template import Renderer
from qtune.export.adapter_weights import open_adapter
from qtune.export.layout import layout_of, open_base
from qtune.export.merge import Merge, Weights, plan_merge, write_merge
from qtune.export.model_card import write_card
from qtune.export.model_files import copy_side_files, merged_config, write_json
from qtune.export.opened_run import OpenedRun
from qtune.export.soft_prompt import CONFIG_KEY, SoftPrompt
from qtune.export.staged import staged_folder
from qtune.export.verification import mark_unverified, seal_export
from qtune.sizes import MIB


@dataclass(frozen=True)
class Target:
    """Where an export goes and in what shape."""

    output: Path
    dtype: torch.dtype
    weights: Weights = "dequantized"
    force: bool = False


def open_merge(source: OpenedRun, target: Target) -> Merge:
    """Decides the whole merge; everything that is in the way is reported here, before anything is written."""
    checkpoint, network = open_base(source.base, trust_remote_code=source.recipe.model.trust_remote_code)
    layout = layout_of(network, list(checkpoint.tensors))
    return plan_merge(checkpoint, layout, open_adapter(source.adapter), source.basis, target.weights, target.dtype)


def write_merged(source: OpenedRun, merge: Merge, target: Target, prompt: SoftPrompt | None = None) -> Path:
    """Writes the model; the folder appears under its name when it is complete.

    Raises:
        InputError: the folder is there, or the disk too small. ExportError: a value does not fit the dtype.
    """
    with staged_folder(target.output, merge.nbytes, force=target.force) as work:
        with console.progress("merging (MiB)", round(merge.nbytes / MIB)) as bar:
            write_merge(merge, work, lambda nbytes: bar.advance(nbytes / MIB))
        copy_side_files(source.base, source.adapter, work)
        notes = {} if prompt is None else {CONFIG_KEY: prompt.note}
        write_json(work / "config.json", merged_config(source.base, target.dtype, merge.config_changes | notes))
        if prompt is not None:
            prompt.tokenizer.save_pretrained(work)
        write_template(work, source.template.of_tokenizer if prompt is None else prompt.template)
        generation = generation_config(source.base, source.tokenizer, source.template.text)
        if prompt is not None:
            generation["suppress_tokens"] = list(prompt.ids)
        write_json(work / "generation_config.json", generation)
        # Until the proof is there; an export that is stopped before it leaves a whole model that says so.
        mark_unverified(work, "not compared with the trained model", target.weights)
        write_card(source, work, None)
        with console.progress("hashing what was written"):
            seal_export(work, source.run.path)
    return target.output


def write_template(work: Path, template: str | dict[str, str]) -> None:
    """Puts chat templates beside a copied tokenizer, in the place of any that came with it; several have names."""
    for leftover in work.glob("chat_template*"):
        leftover.unlink()
    named = {"default": template} if isinstance(template, str) else template
    for name, text in named.items():
        # transformers' own places (5.23, tokenization_utils_base.py, `save_chat_templates`).
        file = work / ("chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    file = work / "tokenizer_config.json"
    if file.exists():
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("chat_template", None) is not None:
            write_json(file, config)


def _json(file: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return read


def _ends_of_model(base: Path) -> Any:
    """What config.json says, as transformers takes it where there is no generation config: an id, several, or None."""
    file = base / "config.json"
    config = _json(file) if file.exists() else {}
    of_text = config.get("text_config") or {}
    return config.get("eos_token_id", of_text.get("eos_token_id"))


def generation_config(base: Path, tokenizer: PreTrainedTokenizerBase, template: str) -> dict[str, Any]:
    """The base's generation config with all tokens that end an answer where qtune asks: its own, those of config.json
    where it has no file of its own, the tokenizer's, and the end of a turn.

    Loaders stop at its `eos_token_id` alone; a base model's does not name the token that ends a turn.
    """
    file = base / "generation_config.json"
    config: dict[str, Any] = _json(file) if file.exists() else {"eos_token_id": _ends_of_model(base)}
    known = config.pop("eos_token_id", None)
    found = [*(known if isinstance(known, list) else [known]), tokenizer.eos_token_id]
    end_of_turn = Renderer.of(tokenizer, template).end_of_turn
    if end_of_turn is not None:
        found.append(tokenizer.convert_tokens_to_ids(end_of_turn))
    ends = [end for end in dict.fromkeys(found) if end is not None]
    if ends:
        config["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    if config.get("pad_token_id") is None and tokenizer.pad_token_id is not None:
        config["pad_token_id"] = tokenizer.pad_token_id
    return config
