"""A GGUF file against the folder it was made from, read back by transformers' own GGUF reader."""

import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from qtune import console
from qtune.data.conversation import RowError
from qtune.data.template import choose_template, default_template, render
from qtune.errors import InputError, Problem
from qtune.export.closeness import KL_LIMITS, TOP1_LIMITS, ClosenessMeter, shortfalls
from qtune.export.gguf.file import Q8_0_BLOCK, GgufType
from qtune.export.gguf.vocabulary import vocabulary_of
from qtune.export.verification import Closeness, GgufProof, Limits
from qtune.export.verify.logits import logits_of
from qtune.export.verify.rows import CheckedRow, encode, probes
from qtune.model.checkpoint import Checkpoint
from qtune.model.gguf_header import require_gguf
from qtune.model.packed import is_statistic, unpacked_shape
from qtune.sizes import size_text

LIMITS = {
    "f16": Limits(KL_LIMITS[torch.float16], TOP1_LIMITS[torch.float16], "float16 rounding, with a tenfold margin"),
    "bf16": Limits(KL_LIMITS[torch.bfloat16], TOP1_LIMITS[torch.bfloat16], "bfloat16 rounding, with a tenfold margin"),
    # How far rounding to 8 bits moves the logits is a matter of the model (1e-3 to 1.2e-2 measured). That each weight
    # is the rounded one is what `_weight_failures` says; beyond these it would be another model.
    "q8_0": Limits(1e-1, 0.80, "ten times what Q8_0 rounding was seen to do"),
}

Q8_0_STEPS = 127
"""From 0 to the largest of 32 weights; their scale is the length of a step, in fp16."""
FP16_ROUNDING, FP16_SMALLEST_ROUNDING = 2.0**-11, 2.0**-25
"""How far fp16 may move a number: of it, and at least, for numbers below 2^-14 have no spacing finer than 2^-24."""

# Pre-tokenizers that transformers' reader rebuilds; with others, and with SentencePiece's space behind every special
# token, its tokens say nothing about the file.
READER_SPLITS = {"default", "gpt-2", "llama-bpe", "qwen2", "tekken"}


def verify_gguf(
    folder: Path, file: Path, kind: GgufType, rows: Sequence[CheckedRow], virtual: Sequence[int]
) -> GgufProof:
    """Compares logits, token ids and the chat template of a GGUF file with those of the folder beside it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    failures = list(_template_failures(file, default_template(tokenizer)))
    config = AutoConfig.from_pretrained(folder)
    vocabulary = vocabulary_of(tokenizer, config.vocab_size, str(folder))
    comparable = vocabulary.pre in READER_SPLITS and not vocabulary.adds_space
    if comparable:
        failures += _token_failures(tokenizer, _read_alone(file), rows)
    closeness, misfits = _compare(folder, file, kind, rows, virtual)
    failures += misfits
    return GgufProof(file.name, kind, closeness, comparable, (*failures, *shortfalls(closeness, LIMITS[kind])))


def _read_alone(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers makes of the file: of nothing else, for it prefers a tokenizer.json beside it."""
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / file.name).symlink_to(file.resolve())
        read: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(alone, gguf_file=file.name)
    return read


def _token_failures(
    tokenizer: PreTrainedTokenizerBase, read: PreTrainedTokenizerBase, rows: Sequence[CheckedRow]
) -> Iterator[str]:
    """The first conversation whose text, as the exported template renders it, has other ids in the file.

    The text is rendered once: what the file's reader knows of special tokens by name is its own matter.
    """
    template = choose_template(None, tokenizer, Path())
    own = [row.conversation for row in rows]
    for conversation in probes(rows):
        try:
            text = template.for_tools(conversation.tools)
            rendered = render(tokenizer, text, conversation.messages, conversation.tools)
        except RowError as error:
            if conversation in own:
                yield f"{conversation.place!r} cannot be rendered with the exported template: {error}"
                return
            continue  # a system message, for example, which not every template has a place for
        if encode(tokenizer, rendered) != encode(read, rendered):
            yield f"{conversation.place!r} has other tokens in the GGUF file"
            return


def _free_memory() -> int:
    """Of the host, with what it may move to its disk."""
    return int(psutil.virtual_memory().available + psutil.swap_memory().free)


def refuse_small_memory(folder: Path) -> None:
    """Asked before a merge of minutes: to compare a GGUF file, it and the export are read in float32 beside each other,
    and the system ends a process that takes more memory than there is without a word.

    folder: the base, or the export; both have as many numbers.

    Raises:
        InputError: less is free.
    """
    base = Checkpoint.open(folder)
    numbers = sum(
        math.prod(unpacked_shape(name, base)) for name in base.tensors if not is_statistic(name, base.tensors)
    )
    needed = 2 * torch.float32.itemsize * numbers
    free = _free_memory()
    if needed > free:
        message = (
            f"reading the file back to compare it takes {size_text(needed)} of memory, and {size_text(free)} are free; "
            "close what takes memory, or export without it and make the file with llama.cpp's convert_hf_to_gguf.py, "
            "which nobody then compares"
        )
        raise InputError(Problem("--gguf", message))


def _compare(
    folder: Path, file: Path, kind: GgufType, rows: Sequence[CheckedRow], virtual: Sequence[int]
) -> tuple[Closeness, list[str]]:
    with console.progress(f"reading {file.name} back"):
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        read: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            config=_config_to_read_with(folder),
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
    meter = ClosenessMeter()
    with console.progress(f"comparing {file.name}, {len(rows)} rows", len(rows)) as bar:
        for row in rows:
            ids = (*virtual, *row.ids)
            meter.add(logits_of(exported, ids), logits_of(read, ids))
            bar.advance()
    return meter.result(), list(_weight_failures(exported, read)) if kind == "q8_0" else []


def _config_to_read_with(folder: Path) -> PretrainedConfig:
    """The export's own, for the reader does not know every key of a file (Qwen 3's head size, rotary scaling), which
    have tests of their own. A Mistral is in the file as the Llama that it computes as, and by that name it is read."""
    config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    if config.model_type != "mistral":
        return config
    own = {"model_type", "architectures", "sliding_window", "transformers_version"}
    return LlamaConfig(**{name: value for name, value in config.to_dict().items() if name not in own})


def _weight_failures(exported: Any, read: Any) -> Iterator[str]:
    """The first tensor of the file that is not the exported one, rounded to 8 bits with a scale for 32 of them.

    Tensors whose rows no block divides, and vectors, are there in fp16 or fp32.
    """
    found = read.state_dict()
    for name, weight in exported.state_dict().items():
        other = found.get(name)
        if other is None or other.shape != weight.shape:
            yield f"{name} is not in the GGUF file as it is in the export"
            return
        if weight.dim() > 1 and weight.shape[-1] % Q8_0_BLOCK == 0:
            blocks = weight.reshape(-1, Q8_0_BLOCK)
            allowed = q8_0_rounding(blocks.abs().amax(dim=1))
            moved = (other.reshape(blocks.shape) - blocks).abs().amax(dim=1)
        else:
            allowed = torch.finfo(torch.float16).eps * weight.abs().clamp(min=1e-4)
            moved = (other - weight).abs()
        if not bool((moved <= allowed).all()):
            yield f"{name} is not the exported one, rounded to 8 bits"
            return


def q8_0_rounding(largest: Tensor) -> Tensor:
    """How far Q8_0 may move a weight of a block, by the block's largest: half a step, and by as many steps as it is
    away from 0 what the step's own length is rounded by."""
    step = largest / Q8_0_STEPS
    step_rounding = (step * FP16_ROUNDING).clamp(min=FP16_SMALLEST_ROUNDING)
    return (step + step_rounding) / 2 + Q8_0_STEPS * step_rounding


def _template_failures(file: Path, expected: str) -> list[str]:
    template = require_gguf(file).values.get("tokenizer.chat_template")
    if template is None:
        return ["the GGUF file has no chat template"]
    return [] if template == expected else ["the GGUF file has another chat template"]
