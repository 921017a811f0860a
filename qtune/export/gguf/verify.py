"""A GGUF file against the folder it was made from, read back by transformers' own GGUF reader."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from qtune import console
from qtune.data.template import default_template
from qtune.export.closeness import KL_LIMITS, TOP1_LIMITS, Closeness, ClosenessMeter, Limits, shortfalls
from qtune.export.gguf.file import GgufType
from qtune.export.gguf.vocabulary import vocabulary_of
from qtune.export.verification import GgufProof
from qtune.export.verify.logits import logits_of
from qtune.export.verify.rows import CheckedRow, probes, rendered_ids
from qtune.model.gguf_header import require_gguf

LIMITS = {
    "f16": Limits(KL_LIMITS[torch.float16], TOP1_LIMITS[torch.float16], "float16 rounding, with a tenfold margin"),
    "bf16": Limits(KL_LIMITS[torch.bfloat16], TOP1_LIMITS[torch.bfloat16], "bfloat16 rounding, with a tenfold margin"),
    # 8 bits and one scale for 32 weights: half a step is 1/254 of the largest of them; measured 1e-3.
    "q8_0": Limits(1e-2, 0.90, "Q8_0 rounding, with a tenfold margin"),
}

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
        read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        for conversation in probes(rows):
            ids = [
                rendered_ids(one, default_template(tokenizer), conversation, generation_prompt=False)
                for one in (tokenizer, read)
            ]
            if ids[0] != ids[1]:
                failures.append(f"{conversation.place!r} has other tokens in the GGUF file")
                break
    closeness = _compare(folder, file, rows, virtual)
    return GgufProof(file.name, kind, closeness, comparable, (*failures, *shortfalls(closeness, LIMITS[kind])))


def _compare(folder: Path, file: Path, rows: Sequence[CheckedRow], virtual: Sequence[int]) -> Closeness:
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    read: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        # The reader does not know every key (Qwen 3's head size, rotary scaling); those are checked by their own tests.
        config=AutoConfig.from_pretrained(folder),
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    meter = ClosenessMeter()
    with console.progress(f"comparing {file.name}, rows", len(rows)) as bar:
        for row in rows:
            ids = (*virtual, *row.ids)
            meter.add(logits_of(exported, ids), logits_of(read, ids))
            bar.advance()
    return meter.result()


def _template_failures(file: Path, expected: str) -> list[str]:
    template = require_gguf(file).values.get("tokenizer.chat_template")
    if template is None:
        return ["the GGUF file has no chat template"]
    return [] if template == expected else ["the GGUF file has another chat template"]
