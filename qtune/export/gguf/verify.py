"""A GGUF file against the folder it was made from, read back by transformers' own GGUF reader."""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedTokenizerBase

from qtune import console
from qtune.data.conversation import RowError
from qtune.data.template import choose_template, default_template, render
from qtune.export.closeness import KL_LIMITS, TOP1_LIMITS, ClosenessMeter, shortfalls
from qtune.export.gguf.file import GgufType
from qtune.export.gguf.vocabulary import vocabulary_of
from qtune.export.verification import Closeness, GgufProof, Limits
from qtune.export.verify.logits import logits_of
from qtune.export.verify.rows import CheckedRow, encode, probes
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
        failures += _token_failures(tokenizer, _read_alone(file), rows)
    closeness = _compare(folder, file, rows, virtual)
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


def _compare(folder: Path, file: Path, rows: Sequence[CheckedRow], virtual: Sequence[int]) -> Closeness:
    with console.progress(f"reading {file.name} back"):
        exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        read: Any = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            # The reader does not know every key (Qwen 3's head size, rotary scaling), which have tests of their own.
            config=AutoConfig.from_pretrained(folder),
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        ).eval()
    meter = ClosenessMeter()
    with console.progress(f"comparing {file.name}, {len(rows)} rows", len(rows)) as bar:
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
